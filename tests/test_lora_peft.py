"""fuse_lora against PEFT: values, gradients, everything that PEFT's layers do, and what is left to PEFT."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.helpers import disable_input_dtype_casting
from peft.tuners import lora
from torch import nn
from torch.nn.utils import parametrize

import rankernel
from attention_cases import assert_close
from rankernel import BlockLayout, fuse_lora, mixed_adapters, unfuse_lora
from rankernel.models.fused_lora import FusedLoraLinear
from rankernel.reference.lora_linear import Dropout, keep_mask
from tiny_models import make_model, random_tokens

RANKS = (1, 2, 7, 16, 64, 256)
HALVES = (torch.bfloat16, torch.float16)
SEED = 5


def make_layer(
    sizes: tuple[int, int], ranks: dict[str, int], base: torch.dtype, adapter: torch.dtype, *, bias: bool = True,
    seed: int = 0, **options: Any,
) -> lora.Linear:  # fmt: skip
    """PEFT's layer with random adapters, all of them active and all of its parameters trained."""
    torch.manual_seed(seed)
    layer: Any = None
    for name, rank in ranks.items():
        config = peft.LoraConfig(r=rank, lora_alpha=rank + 1, init_lora_weights=False, **options)
        if layer is None:
            layer = lora.Linear(nn.Linear(*sizes, bias=bias), name, config=config, r=rank, lora_alpha=rank + 1)
        else:
            layer.update_layer(name, rank, lora_alpha=rank + 1, config=config)
    for name, parameter in layer.named_parameters():
        if name.startswith("lora_B") and name.endswith("bias"):
            nn.init.normal_(parameter)
        if name.startswith("lora_magnitude"):
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
    layer.to(adapter).base_layer.to(base)
    layer.set_adapter(list(ranks))
    return layer.requires_grad_().train()


class Masked(nn.Module):
    """nn.Dropout with the mask that the kernels draw from the generator's state."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(SEED)
        dropout = Dropout(self.p, torch.randint(2**63 - 1, (1,)))
        return x * keep_mask(x[..., 0].numel(), x.shape[-1], dropout).to(x.dtype).view_as(x)


@contextlib.contextmanager
def without_peft() -> Iterator[None]:
    """PEFT's forward is an error inside."""
    with mock.patch.object(lora.Linear, "forward", side_effect=AssertionError("left to PEFT")):
        yield


def fused(module: nn.Module) -> Any:
    module = copy.deepcopy(module)
    fuse_lora(module)
    return module


def run(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    """The result and all gradients."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(SEED)
    out = layer(x, **options)
    out.backward(grad.to(out.dtype))
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **gradients}


def assert_as_peft(layer: lora.Linear, x: torch.Tensor, grad: torch.Tensor, **options: Any) -> None:
    """Values and gradients within twice PEFT's own error against float64."""
    stock = copy.deepcopy(layer)
    for name, dropout in stock.lora_dropout.items():
        if isinstance(dropout, nn.Dropout) and dropout.training:
            stock.lora_dropout[name] = Masked(dropout.p)
    with without_peft():
        ours = run(fused(layer), x, grad, **options)
    eager = run(stock, x, grad, **options)
    truth = run(stock.double(), x.double(), grad.double(), **options)
    for parameter in stock.parameters():
        parameter.data.abs_()
    sizes = run(stock, x.double().abs(), grad.double().abs(), **options)  # what the terms of each sum add up to
    assert ours.keys() == eager.keys()
    for name, found in ours.items():
        assert found.dtype == eager[name].dtype, name
        magnitude = float(sizes[name].max()) if found.numel() else 0.0
        assert_close(found, eager[name], truth[name], name, magnitude)


def random_inputs(layer: lora.Linear, *shape: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = layer.base_layer.weight.dtype
    x = torch.randn(*shape, layer.in_features, generator=generator).to(dtype)
    return x, torch.randn(*shape, layer.out_features, generator=generator).to(dtype)


sizes = st.tuples(st.sampled_from([1, 5, 33, 64, 127, 200]), st.sampled_from([1, 3, 31, 64, 130]))
shapes = st.sampled_from([(1,), (7,), (2, 5), (1, 33), (2, 1, 3), (0,)])
dtypes = st.sampled_from([(torch.float32,) * 2, *((half, torch.float32) for half in HALVES), *((h, h) for h in HALVES)])


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
@pytest.mark.parametrize("rank", RANKS)
@given(data=st.data())
def test_equals_peft(rank: int, data: st.DataObject) -> None:
    others = data.draw(st.sampled_from([[], [], [3], [16, 1]]))
    base, adapter = data.draw(dtypes)
    layer = make_layer(
        data.draw(sizes), {"a": rank} | {f"b{i}": r for i, r in enumerate(others)}, base, adapter,
        bias=data.draw(st.booleans()), use_rslora=data.draw(st.booleans()), lora_bias=data.draw(st.booleans()),
        lora_dropout=data.draw(st.sampled_from([0.0, 0.3])),
    )  # fmt: skip
    layer.train(data.draw(st.booleans()))
    assert_as_peft(layer, *random_inputs(layer, *data.draw(shapes)))


@pytest.mark.parametrize("rank", RANKS)
@settings(max_examples=12)
@given(data=st.data())
def test_dora_equals_peft(rank: int, data: st.DataObject) -> None:
    base, adapter = data.draw(dtypes)
    # The rounding of the base product decides the gradient of the magnitude: of few elements, by luck.
    size = (data.draw(st.sampled_from([33, 64, 127])), data.draw(st.sampled_from([64, 130])))
    layer = make_layer(size, {"a": rank}, base, adapter, bias=data.draw(st.booleans()), use_dora=True)
    assert_as_peft(layer, *random_inputs(layer, *data.draw(shapes)))


@given(data=st.data())
def test_mixed_batch_equals_peft(data: st.DataObject) -> None:
    base, adapter = data.draw(dtypes)
    layer = make_layer(data.draw(sizes), {"a": 4, "b": 1, "c": 19}, base, adapter, lora_dropout=0.2).eval()
    choice = st.sampled_from(["a", "b", "c", "__base__", "only in other layers"])
    names = data.draw(st.lists(choice, min_size=1, max_size=6).filter(lambda names: {"a", "b", "c"} & set(names)))
    inputs = random_inputs(layer, len(names), *data.draw(st.sampled_from([(), (3,), (2, 2)])))
    assert_as_peft(layer, *inputs, adapter_names=names)


@pytest.mark.parametrize(("base", "adapter"), [(torch.float32,) * 2, (torch.bfloat16, torch.float32)])
def test_mixed_training_equals_one_by_one(base: torch.dtype, adapter: torch.dtype) -> None:
    layer = make_layer((37, 50), {"a": 4, "b": 1, "c": 19}, base, adapter, lora_dropout=0.0)
    names = ["c", "a", "__base__", "c", "b"]
    x, grad = random_inputs(layer, len(names), 6)

    def one_by_one(layer: Any, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        total: dict[str, torch.Tensor] = {}
        rows = []
        for name, own, own_grad in zip(names, x, grad, strict=True):
            layer.set_adapter(name if name != "__base__" else [])
            found = run(layer.requires_grad_(), own, own_grad)
            rows.append((found.pop("out"), found.pop("x")))
            for key, value in found.items():
                total[key] = total.get(key, 0) + value
        out, of_x = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return {"out": out, "x": of_x, **total}

    ours_layer = fused(layer)
    with mixed_adapters(ours_layer, names), without_peft():
        ours = run(ours_layer, x, grad)
    eager = one_by_one(copy.deepcopy(layer), x, grad)
    truth = one_by_one(copy.deepcopy(layer).double(), x.double(), grad.double())
    assert ours.keys() == eager.keys()
    for name, found in ours.items():
        assert_close(found, eager[name], truth[name], name)


def test_mixed_training_with_dropout() -> None:
    layer = make_layer((37, 50), {"a": 4}, torch.float32, torch.float32, lora_dropout=0.4)
    x, grad = random_inputs(layer, 3, 6)
    ours_layer = fused(layer)
    with mixed_adapters(ours_layer, ["a", "__base__", "a"]), without_peft():
        mixed = run(ours_layer, x, grad)
    alone = run(ours_layer, x, grad)
    assert torch.allclose(mixed["out"][[0, 2]], alone["out"][[0, 2]], atol=1e-5)
    assert torch.allclose(mixed["out"][1], layer.base_layer(x[1]), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_of_a_mixed_batch_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    layer = fused(make_layer((96, 80), {"a": 4, "b": 33, "c": 7}, dtype, torch.float32))
    x, grad = random_inputs(layer, 4, 9)
    names = ["a", "b", "__base__", "c"]

    def values(names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        with mixed_adapters(layer, names):
            found = run(layer, x, grad)
        return found["out"], found["x"]

    mixed = values(names)
    for row, name in enumerate(names):
        for found, expected in zip(mixed, values([name] * 4), strict=True):
            assert torch.equal(found[row], expected[row]), name


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]


def make_peft_model(adapters: tuple[str, ...] = ("default",), base: Any = None, **options: Any) -> Any:
    model: Any = None
    for rank, name in enumerate(adapters, start=3):
        given = {"r": rank, "lora_alpha": 5, "target_modules": TARGETS, "init_lora_weights": False} | options
        config = peft.LoraConfig(**given)
        torch.manual_seed(rank)
        if model is None:
            model = peft.get_peft_model(base or make_model("qwen3"), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    return model


def loss_and_gradients(model: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(SEED)
    model.zero_grad()
    logits = model(**{"use_cache": False, **inputs}).logits
    logits.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def assert_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, found in ours.items():
        scale = float(expected[name].abs().max())
        assert torch.allclose(found, expected[name], rtol=0, atol=2e-5 * max(scale, 1e-3)), name


def test_model_equals_peft_and_unfuse_restores_it() -> None:
    model = make_peft_model(("a", "b"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = random_tokens(2, 9)
    before = loss_and_gradients(model, input_ids=ids)
    classes = {name: type(module) for name, module in model.named_modules()}
    report = fuse_lora(model)
    assert len(report) == 4 * len(TARGETS)
    assert all(layer.fused and layer.why_not is None for layer in report)
    assert str(report) == f"{len(report)} of {len(report)} LoRA layers run rankernel"
    assert fuse_lora(model) == report
    assert model.state_dict().keys() == state.keys()
    with without_peft():
        assert_same(loss_and_gradients(model, input_ids=ids), before)
    for _ in range(2):
        unfuse_lora(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    after = loss_and_gradients(model, input_ids=ids)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_adapters_come_and_go_as_in_peft(tmp_path: Any) -> None:
    """Whatever is done to the model, fused and stock give the same."""
    stock = make_peft_model(("a", "b")).eval()
    ours = fused(stock)
    ids = random_tokens(2, 9)

    def both(action: Any = lambda model: None, peft_runs: bool = False) -> None:
        for model in (stock, ours):
            action(model)
        with contextlib.nullcontext() if peft_runs else without_peft():
            found = ours(input_ids=ids).logits
        expected = stock(input_ids=ids).logits
        assert torch.allclose(found, expected, rtol=0, atol=2e-5)

    def layers(model: Any) -> list[Any]:
        return [module for module in model.modules() if isinstance(module, lora.Linear)]

    plain = stock(input_ids=ids).logits
    both()
    both(lambda model: model.set_adapter("b"))
    assert not torch.allclose(stock(input_ids=ids).logits, plain, atol=1e-2)
    both(lambda model: [layer.set_scale("b", 3.0) for layer in layers(model)])
    both(lambda model: [layer.scale_layer(0.5) for layer in layers(model)])
    both(lambda model: model.merge_adapter(), peft_runs=True)
    both(lambda model: model.unmerge_adapter())
    both(lambda model: model.base_model.disable_adapter_layers(), peft_runs=True)
    both(lambda model: model.base_model.enable_adapter_layers())

    def add(model: Any) -> None:
        torch.manual_seed(8)
        config = peft.LoraConfig(r=9, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model.add_adapter("c", config)
        model.base_model.set_adapter(["a", "c"])
        model.eval()

    assert len(fuse_lora(ours)) == len(layers(stock))
    both(add, peft_runs=True)  # down_proj is new, so PEFT's still
    fuse_lora(ours)
    both()
    both(lambda model: model.delete_adapter("a"), peft_runs=True)  # k_proj has no active adapter now
    assert ours.state_dict().keys() == stock.state_dict().keys()
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model("qwen3"), tmp_path / "c").eval()
    fuse_lora(loaded)
    ours.set_adapter("c")
    with without_peft():
        found = loaded(input_ids=ids).logits
    # Merging and unmerging has moved the base weights of ours by a rounding.
    assert torch.allclose(found, ours(input_ids=ids).logits, rtol=0, atol=2e-5)
    merged, expected = ours.merge_and_unload(), stock.merge_and_unload()
    assert not any(isinstance(module, lora.LoraLayer) for module in merged.modules())
    assert torch.equal(merged(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_adapter_names_of_peft_run_fused() -> None:
    model = make_peft_model(("a", "b")).eval()
    ids = random_tokens(4, 9)
    names = ["b", "__base__", "a", "b"]
    expected = model(input_ids=ids, adapter_names=names).logits
    fuse_lora(model)
    with without_peft():
        found = model(input_ids=ids, adapter_names=names).logits
        generated = model.generate(input_ids=ids, adapter_names=names, max_new_tokens=3, do_sample=False)
    assert torch.allclose(found, expected, rtol=0, atol=2e-5)
    unfuse_lora(model)
    assert torch.equal(generated, model.generate(input_ids=ids, adapter_names=names, max_new_tokens=3, do_sample=False))
    fuse_lora(model)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(input_ids=ids, adapter_names=["a"])


def test_packed_row_of_several_adapters() -> None:
    layout = BlockLayout.from_lengths([(3, [4, 0, 5], 2), (2, [6], 3), (0, [], 0), (4, [2, 2], 1)])
    names = ["b", "__base__", "a", "a"]
    ids = random_tokens(layout.num_tokens)
    model = make_peft_model(("a", "b"))
    rankernel.attach(model)
    expected = []
    for name, rows in zip(names, layout.segments(), strict=True):
        begin, end = rows[0][0], rows[-1][1]
        lengths = [e - b for b, e, _ in rows]
        if begin == end:
            continue
        own = BlockLayout.from_lengths([(lengths[0], lengths[1:-1], lengths[-1])])
        model.base_model.set_adapter(name if name != "__base__" else [])
        expected.append(model(**rankernel.model_inputs(ids[begin:end], own)).logits[0])
    model.base_model.set_adapter(["a", "b"])
    model.zero_grad()
    torch.cat(expected).square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    fuse_lora(model)
    with mixed_adapters(model, names, layout), without_peft():
        found = loss_and_gradients(model, **rankernel.model_inputs(ids, layout))
    assert_same(found, {"logits": torch.cat(expected)[None].detach(), **gradients})


@pytest.mark.parametrize("mixed", [False, True])
def test_gradient_checkpointing_with_dropout(mixed: bool) -> None:
    model = make_peft_model(("a", "b"), lora_dropout=0.3).train()
    fuse_lora(model)
    ids = random_tokens(2, 9)
    with mixed_adapters(model, ["b", "a"]) if mixed else contextlib.nullcontext(), without_peft():
        expected = loss_and_gradients(model, input_ids=ids)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        norm = type(model.get_base_model().model.layers[0].input_layernorm)
        with mock.patch.object(norm, "forward", autospec=True, side_effect=norm.forward) as calls:
            found = loss_and_gradients(model, input_ids=ids)
    assert calls.call_count > 4 * 4 + 1, "expected the layers to run twice"
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}, {"use_dora": True}, {"lora_bias": True}])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_compiled_layer(base: torch.dtype, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    layer = fused(make_layer((33, 40), {"a": 4}, base, torch.float32, **options))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (4, 7, 9):
        inputs = random_inputs(layer, rows)
        found, expected = run(compiled, *inputs), run(layer, *inputs)
        for name, value in expected.items():
            ours = found[name if name in ("out", "x") else f"_orig_mod.{name}"]
            assert torch.allclose(ours, value, atol=1e-5, rtol=1e-2 if base == torch.bfloat16 else 1e-5), name


def test_compiled_layer_follows_adapters_and_scale() -> None:
    torch._dynamo.reset()
    layer = fused(make_layer((33, 40), {"a": 4, "b": 7}, torch.float32, torch.float32))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, _ = random_inputs(layer, 3, 5)
    results = []

    def check() -> None:
        results.append(compiled(x))
        assert torch.allclose(results[-1], layer(x), atol=1e-6)

    check()
    for scale in (2.0, 3.0, 4.5):
        layer.set_scale("a", scale)
        check()
    layer.set_adapter("b")
    check()
    for names in (["a", "b", "b"], ["b", "__base__", "a"]):
        with mixed_adapters(layer, names):
            check()
    layer.enable_adapters(False)
    check()
    assert len({tuple(result.flatten().tolist()) for result in results}) == len(results)


@pytest.mark.parametrize("mixed", [False, True])
def test_compiled_model(mixed: bool) -> None:
    torch._dynamo.reset()
    model = make_peft_model(("a", "b"), make_model("llama", num_hidden_layers=2))
    fuse_lora(model)
    ids = random_tokens(2, 9)
    with mixed_adapters(model, ["b", "a"]) if mixed else contextlib.nullcontext():
        expected = loss_and_gradients(model, input_ids=ids)
        model.forward = torch.compile(model.forward, backend="aot_eager")
        assert_same(loss_and_gradients(model, input_ids=ids), expected)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_autocast(options: dict[str, Any]) -> None:
    layer = make_layer((33, 40), {"a": 4}, torch.float32, torch.float32, **options)
    x, grad = random_inputs(layer, 7)
    truth = run(copy.deepcopy(layer).double(), x.double(), grad.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager = run(layer, x, grad)
        ours_layer = fused(layer)
        with without_peft():
            ours = run(ours_layer, x, grad)
    assert ours["out"].dtype == torch.bfloat16
    for name, found in ours.items():
        assert found.dtype == eager[name].dtype, name
        assert_close(found, eager[name], truth[name], name)


def test_hooks_of_the_layer_fire() -> None:
    layer = fused(make_layer((33, 40), {"a": 4}, torch.float32, torch.float32))
    x, grad = random_inputs(layer, 7)
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer.register_forward_hook(lambda module, args, output: output * 2)
    layer.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("backward"))
    with without_peft():
        doubled = run(layer, x, grad)
    assert seen == ["before", "backward"]
    assert torch.equal(doubled["out"], 2 * layer.forward(x))


def _hook(part: str, method: str) -> Any:
    def change(layer: Any) -> None:
        module = layer.base_layer if part == "base_layer" else getattr(layer, part)["a"]
        getattr(module, method)(lambda *args: None)

    return change


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class Shifted(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


REASONS: dict[str, tuple[Any, str]] = {
    "forward hook on base_layer": (_hook("base_layer", "register_forward_hook"), "base_layer has hooks"),
    "pre-hook on lora_A": (_hook("lora_A", "register_forward_pre_hook"), "lora_A or lora_B has hooks"),
    "backward hook on lora_B": (_hook("lora_B", "register_full_backward_hook"), "lora_A or lora_B has hooks"),
    "hook on lora_dropout": (_hook("lora_dropout", "register_forward_hook"), "has hooks"),
    "parametrised lora_A": (
        lambda layer: parametrize.register_parametrization(layer.lora_A["a"], "weight", _Doubled()),
        "lora_A or lora_B is a ParametrizedLinear",
    ),
    "parametrised base": (
        lambda layer: parametrize.register_parametrization(layer.base_layer, "weight", _Doubled()),
        "base_layer is a ParametrizedLinear",
    ),
    "replaced forward": (
        lambda layer: setattr(layer.base_layer, "forward", lambda x: torch.ones(*x.shape[:-1], 40)),
        "base_layer has its forward replaced",
    ),
    "other linear": (lambda layer: setattr(layer.base_layer, "__class__", Shifted), "base_layer is a Shifted"),
    "float64": (lambda layer: layer.double(), "base_layer is torch.float64 on cpu"),
    "bfloat16 over float32": (lambda layer: layer.lora_A["a"].bfloat16(), "torch.bfloat16 over torch.float32"),
    "lora_A of another dtype": (
        lambda layer: (layer.base_layer.bfloat16(), layer.lora_A["a"].bfloat16()),
        "lora_A and lora_B of different dtypes",
    ),
    "adapters of two dtypes": (
        lambda layer: (layer.base_layer.bfloat16(), layer.lora_A["b"].bfloat16(), layer.lora_B["b"].bfloat16()),
        "another dtype than 'a'",
    ),
    "other dropout": (
        lambda layer: layer.lora_dropout.update({"a": nn.AlphaDropout(0.5)}), "lora_dropout is a AlphaDropout"
    ),
    "two dropouts": (lambda layer: setattr(layer.lora_dropout["a"], "p", 0.5), "another dropout than 'a'"),
    "full dropout": (
        lambda layer: [setattr(dropout, "p", 1.0) for dropout in layer.lora_dropout.values()], "drops everything"
    ),
    "cast disabled": (lambda layer: setattr(layer, "cast_input_dtype_enabled", False), "cast of the input"),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_left_to_peft(case: str) -> None:
    """The reason is told, and the layer computes what PEFT does, to the bit and with its errors."""
    change, expected = REASONS[case]
    layer = make_layer((33, 40), {"a": 4, "b": 7}, torch.float32, torch.float32, lora_dropout=0.25)
    ours = fused(layer)
    with without_peft():
        run(ours, *random_inputs(ours, 3))
    for module in (layer, ours):
        change(module)
    [(_, is_fused, why_not)] = fuse_lora(ours)
    assert not is_fused
    assert expected in why_not
    inputs = random_inputs(layer, 3)

    def outcome(layer: Any) -> Any:
        try:
            return run(layer, *inputs)
        except RuntimeError as error:
            return str(error)

    found, stock = outcome(ours), outcome(layer)
    assert type(found) is type(stock)
    if isinstance(stock, str):
        assert found == stock
    else:
        assert all(torch.equal(found[name], stock[name]) for name in stock)


def test_variants_left_to_peft() -> None:
    for options, training, reason in (
        ({"alora_invocation_tokens": [3]}, False, "ALoraLinearVariant"),
        ({"use_dora": True, "lora_dropout": 0.5}, True, "DoRA with dropout"),
    ):
        layer = make_layer((33, 40), {"a": 4}, torch.float32, torch.float32, **options).train(training)
        ours = fused(layer)
        assert reason in ours.why_not()
        inputs = random_inputs(layer, 3)
        found, stock = run(ours, *inputs), run(layer, *inputs)
        assert all(torch.equal(found[name], stock[name]) for name in stock)
    two = make_layer((33, 40), {"a": 4, "b": 3}, torch.float32, torch.float32, use_dora=True)
    assert "DoRA beside other adapters" in fused(two).why_not()
    inputs = random_inputs(two, 3)
    found, stock = run(fused(two), *inputs), run(two, *inputs)
    assert all(torch.equal(found[name], stock[name]) for name in stock)
    with pytest.raises(ValueError, match=r"adapter_names.*DoRA"):
        fused(two)(inputs[0], adapter_names=["a", "b", "a"])


def test_other_arguments_left_to_peft() -> None:
    layer = fused(make_layer((33, 40), {"a": 4}, torch.float32, torch.float32))
    x, _ = random_inputs(layer, 3)
    with pytest.raises(TypeError, match="nonsense"):
        layer(x, nonsense=1)
    with without_peft(), pytest.raises(AssertionError, match="left to PEFT"):
        layer(x, alora_offsets=[1, 2, 3])


def test_input_cast_can_be_disabled_as_in_peft() -> None:
    model = make_peft_model()
    fuse_lora(model)
    ids = random_tokens(1, 5)
    with disable_input_dtype_casting(model), mock.patch.object(lora.Linear, "forward", autospec=True,
                                                               side_effect=lora.Linear.forward) as stock:  # fmt: skip
        model(input_ids=ids)
    assert stock.call_count == 4 * len(TARGETS)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.convolution = nn.Conv1d(16, 16, 3, padding=1)
        self.transposed = transformers.pytorch_utils.Conv1D(16, 16)
        self.linear = nn.Linear(16, 16)
        self.other = Shifted(16, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.convolution(self.embedding(ids).mT).mT.contiguous()
        return self.other(self.linear(self.transposed(x)))


def make_mixture() -> Any:
    targets = ["embedding", "convolution", "transposed", "linear", "other"]
    return peft.get_peft_model(Mixture(), peft.LoraConfig(target_modules=targets, init_lora_weights=False))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_report_names_what_is_not_fused() -> None:
    model = make_mixture()
    ids = torch.arange(6).view(2, 3)
    expected = model(ids)
    report = fuse_lora(model)
    found = {layer.name.rpartition(".")[2]: (layer.fused, layer.why_not) for layer in report}
    assert found == {
        "embedding": (False, "a Embedding is not lora.Linear"),
        "convolution": (False, "a Conv1d is not lora.Linear"),
        "transposed": (False, "base_layer is a Conv1D"),
        "linear": (True, None),
        "other": (False, "base_layer is a Shifted"),
    }
    assert str(report).startswith("1 of 5 LoRA layers run rankernel\n")
    assert "PEFT runs 1, base_layer is a Shifted: base_model.model.other" in str(report)
    assert torch.allclose(model(ids), expected, atol=1e-6)
    with pytest.raises(ValueError, match="fused LoRA layers alone, got Embedding at base_model"):
        mixed_adapters(model, ["default"]).__enter__()


def test_model_without_lora_and_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="model: expected LoRA layers of PEFT, Linear has none"):
        fuse_lora(nn.Linear(3, 3))
    unfuse_lora(nn.Linear(3, 3))
    monkeypatch.setitem(sys.modules, "peft.tuners", None)
    with pytest.raises(ImportError, match=r"pip install \"rankernel\[peft\]\""):
        fuse_lora(nn.Linear(3, 3))


def test_mixed_adapters_refuses_what_it_would_do_wrong() -> None:
    model = make_peft_model(("a", "b"))
    ids = random_tokens(2, 9)
    layout = BlockLayout.from_lengths([(9, [], 0), (9, [], 0)])
    with pytest.raises(ValueError, match="fused LoRA layers alone, got Linear at base_model"):
        mixed_adapters(model, ["a", "b"]).__enter__()
    fuse_lora(model)
    for names, options, error in (
        (["a", "x"], {}, r"adapter_names: expected some of \['__base__', 'a', 'b'\], got \['x'\]"),
        ("ab", {}, "adapter_names: expected one name for each"),
        (["a"], {"layout": layout}, "adapter_names: expected 2, one for each list, got 1"),
    ):
        with pytest.raises(ValueError, match=error):
            mixed_adapters(model, names, **options).__enter__()
    with mixed_adapters(model, ["a"]), pytest.raises(ValueError, match=r"expected 1 rows of the batch .* got 2"):
        model(input_ids=ids)
    with mixed_adapters(model, ["a", "b"], layout):
        with pytest.raises(ValueError, match=r"expected 18 tokens, as the layout has, .* got 9"):
            model(input_ids=ids[:1])
        model(input_ids=ids)
        layer = model.base_model.model.model.layers[1].mlp.up_proj
        with pytest.raises(ValueError, match="no adapter_names"):
            layer(torch.zeros(2, 64), adapter_names=["a", "a"])
        handle = layer.lora_A["b"].register_forward_hook(print)
        with pytest.raises(ValueError, match="got adapter 'b': lora_A or lora_B has hooks"):
            model(input_ids=ids)
        handle.remove()
    for layer in (module for module in model.modules() if isinstance(module, FusedLoraLinear)):
        assert layer.rankernel_batch is None
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="got merged adapters at"):
        mixed_adapters(model, ["a", "b"]).__enter__()
    model.unmerge_adapter()
    other = make_peft_model(("a",), modules_to_save=["lm_head"])
    fuse_lora(other)
    with pytest.raises(ValueError, match="got ModulesToSaveWrapper at base_model"):
        mixed_adapters(other, ["a", "a"]).__enter__()
    for options, error in (({"lora_bias": True}, "DoRA or a bias in a mixed"), ({"use_dora": True}, "DoRA beside")):
        layer = fused(make_layer((5, 5), {"a": 2, "b": 2}, torch.float32, torch.float32, **options))
        with pytest.raises(ValueError, match=error):
            mixed_adapters(layer, ["a", "b"]).__enter__()


def test_mixed_adapters_nest_and_can_be_disabled() -> None:
    model = make_peft_model(("a", "b"))
    ids = random_tokens(2, 9)
    fuse_lora(model)

    def logits(names: list[str]) -> torch.Tensor:
        with mixed_adapters(model, names):
            return model(input_ids=ids).logits

    with mixed_adapters(model, ["a", "b"]):
        assert torch.equal(logits(["b", "b"])[1], model(input_ids=ids).logits[1])
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, model.base_model.model(input_ids=ids).logits)
            disabled = model(input_ids=ids).logits
    assert torch.allclose(disabled, logits(["__base__", "__base__"]), atol=1e-5)
    assert not torch.allclose(disabled, logits(["a", "b"]), atol=1e-2)


def test_copies_stay_fused() -> None:
    layer = fused(make_layer((33, 40), {"a": 4}, torch.float32, torch.float32))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x, _ = random_inputs(layer, 3)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert type(other) is FusedLoraLinear
        with without_peft():
            assert torch.equal(other(x), layer(x))


def _train_in_parallel(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", world_size=2, rank=rank)
    layer = fused(make_layer((33, 40), {"a": 4}, torch.float32, torch.float32, lora_dropout=0.0))
    layer.base_layer.requires_grad_(False)
    parallel = nn.parallel.DistributedDataParallel(layer)
    with without_peft():
        run(parallel, *random_inputs(layer, 3, seed=rank))
    if rank == 0:
        torch.save([layer.lora_A["a"].weight.grad, layer.lora_B["a"].weight.grad], f"{folder}/gradients.pt")
    torch.distributed.destroy_process_group()
    # The destructor of gloo's group holds the GIL and joins a thread that may wait for it (seen with torch 2.13).
    os._exit(0)


def test_distributed_data_parallel(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_train_in_parallel, (str(tmp_path),), nprocs=2)
    layer = make_layer((33, 40), {"a": 4}, torch.float32, torch.float32)
    runs = [run(layer, *random_inputs(layer, 3, seed=rank)) for rank in range(2)]
    for found, name in zip(torch.load(tmp_path / "gradients.pt"), ("lora_A.a.weight", "lora_B.a.weight"), strict=True):
        assert torch.allclose(found, (runs[0][name] + runs[1][name]) / 2, atol=1e-5)
