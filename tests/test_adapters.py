"""rankernel.adapters: every variant against its dense formula in float64, with all gradients; DoRA against PEFT too."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from attention_cases import DTYPES, assert_close
from rankernel import lora_linear
from rankernel.adapters import (
    DoRALinear,
    DyLoRALinear,
    LoRALinear,
    NOLALinear,
    SLTrainLinear,
    SMoRALinear,
    SVDQuantLinear,
    dora_linear,
    dora_norm,
    quantize,
    row_norm,
)

DORA = importlib.import_module("rankernel.adapters.dora")
SLTRAIN = importlib.import_module("rankernel.adapters.sltrain")
ROWS, SIZE_IN, SIZE_OUT = (3, 7), 96, 50
# The dtype of the layer, and of the adapter.
MIXED = [*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float32)]

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def base_layer(dtype: torch.dtype = torch.float32, size_in: int = SIZE_IN, size_out: int = SIZE_OUT) -> torch.nn.Linear:
    return torch.nn.Linear(size_in, size_out, dtype=dtype)


def randomised(module: torch.nn.Module) -> Any:
    """With no adapter parameter left at 0."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape).to(parameter.dtype)
    return module


def compare(
    module: torch.nn.Module,
    dense: Callable[[torch.Tensor, Tensors], torch.Tensor],
    x: torch.Tensor,
    *,
    magnitude: float = 0.0,
) -> None:
    """module(x) and the gradients of x and of every trainable parameter against ``dense(x, parameters)``."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    learning = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    grad = torch.randn(*x.shape[:-1], SIZE_OUT, dtype=torch.float64).to(x.dtype)

    def run(wide: torch.dtype | None) -> Tensors:
        given = {name: t.detach().to(wide) if wide and t.is_floating_point() else t for name, t in tensors.items()}
        leaves = {name: given[name].detach().requires_grad_() for name in learning}
        leaves["x"] = x.detach().to(wide or x.dtype).requires_grad_()
        y = dense(leaves["x"], given | leaves)
        gradients = torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype))
        return {"y": y, **dict(zip(leaves, gradients, strict=True))}

    leaf = x.detach().requires_grad_()
    y = module(leaf)
    assert y.dtype == x.dtype
    gradients = torch.autograd.grad(y, [leaf, *learning.values()], grad)
    ours = dict(zip(["y", "x", *learning], [y, *gradients], strict=True))
    eager, truth = run(None), run(torch.float64)
    for name, tensor in ours.items():
        assert tensor.dtype == eager[name].dtype, name
        assert_close(tensor, eager[name], truth[name], name, magnitude)


def lora(x: torch.Tensor, p: Tensors, scaling: float, gate: torch.Tensor | float = 1.0) -> torch.Tensor:
    """What PEFT computes: the update in the dtype of the adapter, rounded to that of the layer at the end."""
    update = scaling * ((x.to(p["lora_A"].dtype) @ p["lora_A"].T) * gate) @ p["lora_B"].T
    return (F.linear(x, p["base.weight"], p["base.bias"]) + update).to(x.dtype)


class Largest(TorchDispatchMode):
    """The most elements that an operator inside the block makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in old:
                self.elements = max(self.elements, tensor.numel())
        return out


def saved_elements(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The result, and the elements of the largest tensor that it keeps for the backward pass."""
    kept = [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    return y, max(kept)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), MIXED)
def test_lora(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    module = LoRALinear(base_layer(dtype), 5, 0.7, dtype=adapter_dtype)
    x = torch.randn(*ROWS, SIZE_IN).to(dtype)
    assert torch.equal(module(x), module.base(x)), "an untrained adapter changes nothing"
    assert sorted(name for name, p in module.named_parameters() if p.requires_grad) == ["lora_A", "lora_B"]
    compare(randomised(module), lambda x, p: lora(x, p, 0.7), x)


# DoRA


def dora(x: torch.Tensor, p: Tensors, scaling: float) -> torch.Tensor:
    """As PEFT writes it, BA dense and the norm detached."""
    weight = p["base.weight"].to(p["lora_A"].dtype)
    norm = torch.linalg.norm(weight + scaling * (p["lora_B"] @ p["lora_A"]).detach(), dim=1)
    gain = p["magnitude"] / norm
    base = F.linear(x, p["base.weight"])
    update = scaling * (x.to(p["lora_A"].dtype) @ p["lora_A"].T) @ p["lora_B"].T
    y = base + (gain - 1) * base + gain * update
    return (y + p["base.bias"]).to(x.dtype)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), MIXED)
def test_dora(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    module = DoRALinear(base_layer(dtype), 5, 0.7, dtype=adapter_dtype)
    x = torch.randn(*ROWS, SIZE_IN).to(dtype)
    assert torch.equal(module(x), module.base(x)) or dtype != torch.float32, "an untrained adapter changes nothing"
    compare(randomised(module), lambda x, p: dora(x, p, 0.7), x)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), MIXED)
def test_dora_norm(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    weight = torch.randn(SIZE_OUT, SIZE_IN).to(dtype)
    lora_A, lora_B = torch.randn(9, SIZE_IN).to(adapter_dtype), torch.randn(SIZE_OUT, 9).to(adapter_dtype)
    truth = (weight.double() - 0.3 * lora_B.double() @ lora_A.double()).norm(dim=1)
    kept = row_norm(weight)
    for norm in (
        dora_norm(weight, lora_A, lora_B, -0.3),
        dora_norm(weight, lora_A, lora_B, -0.3, kept),
        dora_norm(lambda: weight, lora_A, lora_B, -0.3),
    ):
        assert norm.dtype == torch.float32
        torch.testing.assert_close(norm.double(), truth, rtol=2e-6, atol=0)
    torch.testing.assert_close(kept.double(), weight.double().norm(dim=1), rtol=1e-6, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dora_norm(weight, lora_A, lora_B, -0.3), norm), "autocast does not reach the norm"


def test_dora_norm_of_a_cancelled_row_is_finite() -> None:
    lora_A, lora_B = torch.randn(64, SIZE_IN), torch.randn(2000, 64)
    norm = dora_norm(-0.5 * lora_B @ lora_A, lora_A, lora_B, 0.5)
    assert (norm > 0).all()
    assert (norm < 1e-3 * row_norm(0.5 * lora_B @ lora_A)).all()


def test_dora_norm_makes_no_dense_update() -> None:
    weight, lora_A, lora_B = torch.randn(3000, 1024), torch.randn(8, 1024), torch.randn(3000, 8)
    with Largest() as largest:
        dora_norm(weight, lora_A, lora_B, 1.0)
    assert largest.elements <= 2**20 < weight.numel()


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [MIXED[0], MIXED[1], MIXED[3]])
def test_dora_is_that_of_peft(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    config = LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0"], init_lora_weights=False)
    layer = inject_adapter_in_model(config, torch.nn.Sequential(base_layer(dtype)))[0]
    for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        part.to(adapter_dtype)
    layer.lora_magnitude_vector["default"].weight.data *= torch.linspace(0.9, 1.2, SIZE_OUT).to(adapter_dtype)
    exact = copy.deepcopy(layer).double()
    x, grad = torch.randn(*ROWS, SIZE_IN).to(dtype), torch.randn(*ROWS, SIZE_OUT).to(dtype)

    def gradients(layer: Any, forward: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        adapter = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        magnitude = layer.lora_magnitude_vector["default"].weight
        leaf = x.to(layer.base_layer.weight.dtype).requires_grad_()
        y = forward(leaf, layer.base_layer, *adapter, magnitude)
        return [y, *torch.autograd.grad(y, [leaf, *adapter, magnitude], grad.to(y.dtype))]

    def ours(x: torch.Tensor, base: Any, lora_A: Any, lora_B: Any, magnitude: Any) -> torch.Tensor:
        return dora_linear(x, base.weight, lora_A, lora_B, 6 / 4, magnitude, bias=base.bias)

    found = gradients(layer, ours), gradients(layer, lambda x, *_: layer(x)), gradients(exact, lambda x, *_: exact(x))
    for name, tensor, peft, truth in zip(("y", "x", "lora_A", "lora_B", "magnitude"), *found, strict=True):
        assert tensor.dtype == peft.dtype
        assert_close(tensor, peft, truth, name)


def test_dora_sums_the_gradient_of_the_gain_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DORA, "_BLOCK", 64 * SIZE_OUT)
    y, grad = torch.rand(1000, SIZE_OUT).to(torch.bfloat16), torch.rand(1000, SIZE_OUT).to(torch.bfloat16)
    gain = torch.ones(SIZE_OUT, requires_grad=True)
    DORA._Scale.apply(y, gain).backward(grad)
    torch.testing.assert_close(gain.grad.double(), (y.double() * grad.double()).sum(0), rtol=1e-6, atol=0)


def test_dora_does_not_round_the_gain() -> None:
    """In bfloat16 1.01 would be 1.0078."""
    module = DoRALinear(base_layer(torch.bfloat16), 4, 1.0)
    module.base.bias.data.zero_()
    x = torch.randn(2000, SIZE_IN).to(torch.bfloat16)
    before = module(x).double()
    module.magnitude.data *= 1.01
    gain = (before * module(x).double()).sum() / before.square().sum()
    assert gain.item() == pytest.approx(1.01, abs=5e-4)


# DyLoRA


@pytest.mark.parametrize("dtype", DTYPES)
def test_dylora_of_every_rank(dtype: torch.dtype) -> None:
    module = randomised(DyLoRALinear(base_layer(dtype), 6, 0.7)).eval()
    x = torch.randn(*ROWS, SIZE_IN).to(dtype)
    for b in (1, 4, 6):
        module.rank = b
        compare(module, lambda x, p, b=b: lora(x, p, 0.7, gate=(torch.arange(6) < b).to(p["lora_A"].dtype)), x)
    module.rank = 7
    with pytest.raises(ValueError, match="rank: expected 1 to 6, got 7"):
        module(x)


@pytest.mark.parametrize("frozen", [False, True])
def test_dylora_trains_a_prefix(frozen: bool) -> None:
    module = randomised(DyLoRALinear(base_layer(), 5, 0.7, frozen=frozen, generator=torch.Generator().manual_seed(3)))
    x = torch.randn(*ROWS, SIZE_IN)
    drawn = torch.Generator().manual_seed(3)
    seen = set()
    for _ in range(40):
        b = int(torch.randint(1, 6, (), generator=drawn))
        seen.add(b)
        module.zero_grad()
        y = module(x)
        y.square().sum().backward()
        given = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
        truth = lora(x, given, 0.7, gate=(torch.arange(5) < b).float())
        torch.testing.assert_close(y, truth)
        truth.square().sum().backward()
        learns = torch.arange(5) == b - 1 if frozen else torch.arange(5) < b
        torch.testing.assert_close(module.lora_A.grad, given["lora_A"].grad * learns[:, None], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.lora_B.grad, given["lora_B"].grad * learns, rtol=1e-4, atol=1e-4)
        assert (module.lora_A.grad[~learns] == 0).all()
        assert (module.lora_B.grad[:, ~learns] == 0).all()
    assert seen == {1, 2, 3, 4, 5}


def test_dylora_under_checkpointing_uses_the_same_rank_again() -> None:
    module = randomised(DyLoRALinear(base_layer(), 64, 0.7))
    x = torch.randn(*ROWS, SIZE_IN)
    found = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        module.zero_grad()
        torch.manual_seed(5)
        run(x).square().sum().backward()
        found.append(module.lora_A.grad.clone())
    assert torch.equal(*found)


# SMoRA


def smora(x: torch.Tensor, p: Tensors, scaling: float, active: int, expert: int) -> torch.Tensor:
    z = torch.sigmoid(x @ p["router"].T + p["balance"].to(x.dtype))
    threshold = z.sort(dim=-1, descending=True).values[..., active // expert - 1, None]
    kept = torch.where(z >= threshold, z, 0)
    gate = (kept / kept.sum(-1, keepdim=True) * (active // expert)).repeat_interleave(expert, dim=-1)
    return lora(x, p, scaling, gate)


@pytest.mark.parametrize(("active", "expert"), [(3, 1), (12, 1), (4, 2), (1, 1)])
def test_smora(active: int, expert: int) -> None:
    module = randomised(SMoRALinear(base_layer(), 12, active, 0.7, expert_rank=expert)).eval()
    module.balance += 0.3 * torch.randn(12 // expert)
    x = torch.randn(*ROWS, SIZE_IN)
    gates = module.gates(x)
    torch.testing.assert_close(gates.sum(-1), torch.full(ROWS, float(active)))
    assert ((gates != 0).sum(-1) == active).all()
    groups = gates.unflatten(-1, (-1, expert))
    assert (groups == groups[..., :1]).all()
    compare(module, lambda x, p: smora(x, p, 0.7, active, expert), x)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), MIXED[1:])
def test_smora_of_short_dtypes(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    """Given the choice, which rounding may tip."""
    module = randomised(SMoRALinear(base_layer(dtype), 12, 3, 0.7, dtype=adapter_dtype)).eval()
    x = torch.randn(*ROWS, SIZE_IN).to(dtype)
    gates = module.gates(x).detach()
    exact = torch.sigmoid(x.double() @ module.router.double().T)
    chosen = gates != 0
    torch.testing.assert_close(
        gates.double(), torch.where(chosen, 3 * exact / (exact * chosen).sum(-1, keepdim=True), 0), rtol=0.02, atol=0
    )
    module.gates = lambda _: gates
    module.router.requires_grad_(False)
    compare(module, lambda x, p: lora(x, p, 0.7, gates.to(p["lora_A"].dtype)), x)


def test_smora_balances_in_training_only() -> None:
    module = randomised(SMoRALinear(base_layer(), 6, 2, 1.0))
    x = torch.randn(*ROWS, SIZE_IN)
    counts = (module.eval().gates(x) != 0).sum(dim=(0, 1))
    assert (module.balance == 0).all()
    module.train()(x)
    average = math.prod(ROWS) * 2 / 6
    torch.testing.assert_close(module.balance, 1e-5 * (average - counts).sign(), rtol=0, atol=0)
    assert module.balance.unique().numel() > 1


@pytest.mark.parametrize(("active", "expert"), [(0, 1), (7, 1), (3, 2), (2, 4)])
def test_smora_errors(active: int, expert: int) -> None:
    with pytest.raises(ValueError, match=r"^(active_rank|expert_rank): expected"):
        SMoRALinear(base_layer(), 6, active, 1.0, expert_rank=expert)


# NOLA


def nola_bases(seed: int, number: int, *shape: int) -> torch.Tensor:
    """All at once, where the module draws 16 at a time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(number, *shape).uniform_(-1, 1, generator=generator) / math.sqrt(number)


@pytest.mark.parametrize("number", [1, 16, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nola(dtype: torch.dtype, number: int) -> None:
    module = randomised(NOLALinear(base_layer(dtype), 4, 0.7, num_bases=number, seed=3))
    of_a, of_b = nola_bases(6, number, 4, SIZE_IN), nola_bases(7, number, SIZE_OUT, 4)

    def dense(x: torch.Tensor, p: Tensors) -> torch.Tensor:
        factors = {"lora_A": torch.einsum("i,irk->rk", p["a"], of_a.to(p["a"].dtype))}
        factors["lora_B"] = torch.einsum("i,ior->or", p["b"], of_b.to(p["b"].dtype))
        return lora(x, p | factors, 0.7)

    compare(module, dense, torch.randn(*ROWS, SIZE_IN).to(dtype), magnitude=50)


def test_nola_starts_as_the_layer_and_like_lora() -> None:
    module = NOLALinear(base_layer(size_in=1000), 8, 1.0)
    x = torch.randn(4, 1000)
    state = torch.get_rng_state()
    assert torch.equal(module(x), module.base(x))
    assert torch.equal(torch.get_rng_state(), state), "the bases leave PyTorch's own generator alone"
    lora_A, _ = module.factors()
    assert lora_A.std().item() == pytest.approx(1 / math.sqrt(3 * 1000), rel=0.15)


def test_nola_keeps_no_bases() -> None:
    module = NOLALinear(base_layer(), 4, 1.0, num_bases=256)
    x = torch.randn(2, SIZE_IN)
    with Largest() as largest:
        y, kept = saved_elements(lambda: module(x))
        y.sum().backward()
    assert largest.elements == max(16 * 4 * SIZE_IN, SIZE_IN * SIZE_OUT)
    assert kept <= SIZE_IN * SIZE_OUT  # the weight


# SLTrain


def sltrain(x: torch.Tensor, p: Tensors, scaling: float) -> torch.Tensor:
    sparse = torch.zeros(SIZE_OUT, SIZE_IN, dtype=x.dtype).scatter(1, p["support"].long(), p["values"])
    return F.linear(x, scaling * p["lora_B"] @ p["lora_A"] + sparse, p["bias"])


@pytest.mark.parametrize("block", [1, 7 * SIZE_IN, 2**20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sltrain(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SLTRAIN, "_BLOCK", block)
    module = randomised(SLTrainLinear(SIZE_IN, SIZE_OUT, 24, 0.3, density=0.1, bias=True, dtype=dtype))
    assert module.support.shape == (SIZE_OUT, 10)
    assert all(row.unique().numel() == 10 for row in module.support)
    compare(module, lambda x, p: sltrain(x, p, 0.3), torch.randn(*ROWS, SIZE_IN).to(dtype))


def test_sltrain_keeps_nothing_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SLTRAIN, "_BLOCK", 5 * SIZE_IN)
    module = SLTrainLinear(SIZE_IN, SIZE_OUT, 4, 1.0)
    y, kept = saved_elements(lambda: module(torch.randn(2, SIZE_IN)))
    assert kept < SIZE_OUT * SIZE_IN / 2
    # x needs no gradient here, so that no dense weight is made at all.
    with Largest() as largest:
        y.sum().backward()
    assert largest.elements == 5 * SIZE_IN


# Quantised weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantize(bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(SIZE_OUT, SIZE_IN).to(dtype)
    weight[3, 32:64] = 0
    quantized = quantize(weight, bits, 32)
    assert quantized.codes.nbytes == weight.numel() * bits // 8
    assert quantized.scales.shape == (SIZE_OUT, 3)
    assert quantized.scales.dtype == dtype
    dense = quantized.dequantize()
    assert dense.dtype == dtype
    assert (dense[3, 32:64] == 0).all()
    steps = quantized.scales.double().repeat_interleave(32, dim=1)
    error = (quantized.dequantize(torch.float64) - weight.double()).abs()
    # Half a step; at the largest value of a group, the rounding of its scale too.
    assert (error <= steps * (0.5 + 2 ** (bits - 1) * torch.finfo(dtype).eps)).all()
    codes = (quantized.dequantize(torch.float64) / steps.clamp(min=1e-30)).round()
    assert codes.unique().numel() > 2 ** (bits - 1), "both signs, and most codes"
    torch.testing.assert_close(dense.double(), quantized.dequantize(torch.float64), rtol=torch.finfo(dtype).eps, atol=0)


def test_quantize_errors() -> None:
    weight = torch.randn(4, 96)
    with pytest.raises(ValueError, match="bits: expected 4 or 8, got 3"):
        quantize(weight, 3)
    for size in (64, 3, 0):
        with pytest.raises(ValueError, match=f"group_size: expected an even divisor of 96, got {size}"):
            quantize(weight, group_size=size)


def test_qlora_dequantises_twice_and_keeps_nothing() -> None:
    quantized = quantize(torch.randn(SIZE_OUT, SIZE_IN).to(torch.bfloat16), group_size=32)
    lora_A, lora_B = torch.randn(4, SIZE_IN, requires_grad=True), torch.randn(SIZE_OUT, 4, requires_grad=True)
    x = torch.randn(5, SIZE_IN).to(torch.bfloat16).requires_grad_()
    calls = []

    def weight() -> torch.Tensor:
        calls.append(1)
        return quantized.dequantize()

    found = []
    for given in (weight, quantized.dequantize()):
        y, kept = saved_elements(lambda given=given: lora_linear(x, given, lora_A, lora_B, 0.5))
        assert (kept < SIZE_OUT * SIZE_IN) == callable(given)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), [x, lora_A, lora_B])])
    assert len(calls) == 2
    assert all(torch.equal(ours, dense) for ours, dense in zip(*found, strict=True))


def outliers(dtype: torch.dtype) -> torch.Tensor:
    """A weight of a few large directions and small noise, the case for a low-rank branch."""
    return (torch.randn(SIZE_OUT, 6) @ torch.randn(6, SIZE_IN) + 0.1 * torch.randn(SIZE_OUT, SIZE_IN)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_svdquant(bits: int, smoothed: bool, dtype: torch.dtype) -> None:
    weight, bias = outliers(dtype), torch.randn(SIZE_OUT).to(dtype)
    smooth = torch.rand(SIZE_IN) + 0.5 if smoothed else None
    module = SVDQuantLinear(weight, bias, rank=8, bits=bits, group_size=32, smooth=smooth)
    assert not list(module.parameters())
    plain = (quantize(weight, bits, 32).dequantize(torch.float64) - weight.double()).norm()
    effective = module.rest().double() + module.up.double() @ module.down.double()
    assert (effective - weight.double()).norm() < 0.15 * plain or (bits == 8 and dtype != torch.float32)
    assert (effective - weight.double()).norm() < plain

    def dense(x: torch.Tensor, p: Tensors) -> torch.Tensor:
        rest = module.rest().to(x.dtype)
        y = F.linear(x, rest, p["bias"]) + (x @ p["down"].T) @ p["up"].T
        if "lora_A" in p:
            y = y + 0.7 * ((x.to(p["lora_A"].dtype) @ p["lora_A"].T) @ p["lora_B"].T)
        return y.to(x.dtype)

    x = torch.randn(*ROWS, SIZE_IN).to(dtype)
    compare(module, dense, x)
    before = module(x)
    for own in {None, torch.float32}:
        module.add_lora(3, 0.7, dtype=own)
        assert_close(module(x), before, before.double(), "an untrained adapter changes nothing")
        compare(randomised(module), dense, x)
        assert [name for name, _ in module.named_parameters()] == ["lora_A", "lora_B"]


def test_svdquant_of_rank_0_is_the_quantised_weight() -> None:
    weight = torch.randn(SIZE_OUT, SIZE_IN)
    module = SVDQuantLinear(weight, rank=0, group_size=32)
    x = torch.randn(5, SIZE_IN)
    assert torch.equal(module(x), F.linear(x, quantize(weight, 4, 32).dequantize()))


# All modules


def modules(seed: int) -> dict[str, torch.nn.Module]:
    torch.manual_seed(seed)
    quantised = SVDQuantLinear(torch.randn(SIZE_OUT, SIZE_IN), torch.randn(SIZE_OUT), rank=4, group_size=32)
    quantised.add_lora(3, 0.5)
    found = {
        "lora": LoRALinear(base_layer(), 4, 0.5),
        "dora": DoRALinear(base_layer(), 4, 0.5),
        "dylora": DyLoRALinear(base_layer(), 4, 0.5),
        "smora": SMoRALinear(base_layer(), 4, 2, 0.5),
        "nola": NOLALinear(base_layer(), 4, 0.5, num_bases=20, seed=seed),
        "sltrain": SLTrainLinear(SIZE_IN, SIZE_OUT, 4, 0.5, bias=True),
        "svdquant": quantised,
    }
    found["smora"].balance += torch.randn(4)
    return {name: randomised(module).eval() for name, module in found.items()}


@pytest.mark.parametrize("name", modules(0))
def test_state_dict(name: str) -> None:
    first, second = modules(1)[name], modules(2)[name]
    x = torch.randn(5, SIZE_IN)
    assert not torch.allclose(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("name", modules(0))
def test_autocast(name: str) -> None:
    module = modules(1)[name]
    x = torch.randn(5, SIZE_IN, requires_grad=True)
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    if name != "smora":  # whose choice may tip
        torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.1)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", modules(0))
def test_compiled(name: str) -> None:
    module = modules(1)[name]
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    found = []
    for run in (module, torch.compile(module, backend="aot_eager")):
        x = torch.randn(5, SIZE_IN, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = run(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *learning])])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("name", modules(0))
def test_shapes(name: str) -> None:
    module = modules(1)[name]
    x = torch.randn(SIZE_IN)
    torch.testing.assert_close(module(x), module(x[None])[0])
    module(x[None][:0]).sum().backward()
    assert all((p.grad == 0).all() for p in module.parameters() if p.requires_grad)


def test_rank_errors() -> None:
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        LoRALinear(base_layer(), 0, 1.0)
    with pytest.raises(ValueError, match="num_bases: expected at least 1, got 0"):
        NOLALinear(base_layer(), 2, 1.0, num_bases=0)
    with pytest.raises(ValueError, match="rank: expected 0 to 50, got 51"):
        SVDQuantLinear(torch.randn(50, 96), rank=51)
    with pytest.raises(ValueError, match="density: expected a number in"):
        SLTrainLinear(4, 4, 2, 1.0, density=0.0)
