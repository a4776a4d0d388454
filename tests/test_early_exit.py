"""Early exit and the scores of one layer at the least cost, on eleven families."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers

from rankernel.layout import BlockLayout
from rankernel.models import ScoreRequest, attach, attached, early_exit, layer_scores, model_inputs
from tiny_models import FAMILIES, dense_inputs, make_model, random_tokens

LAYOUT = BlockLayout.from_lengths([(4, [7, 2, 7], 6), (3, [6, 1], 5)])
TOKENS = random_tokens(LAYOUT.num_tokens)
ROWS = LAYOUT.tail_positions(2)

families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def attached_model(family: str, **overrides: Any) -> Any:
    model = make_model(family, **overrides)
    attach(model)
    return model


def full_run(model: Any, layers: list[int]) -> tuple[torch.Tensor, ...]:
    return model(**model_inputs(TOKENS, LAYOUT, scores=ScoreRequest(layers, ROWS))).attentions


def count_calls(model: torch.nn.Module) -> dict[str, list[torch.Size]]:
    """Shapes of the first input of every call of every module, by name."""
    calls: dict[str, list[torch.Size]] = {}

    def hook(name: str) -> Any:
        def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), torch.empty(0))
            calls.setdefault(name, []).append(first.shape)

        return record

    for name, module in model.named_modules():
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
    return calls


@families
def test_early_exit_runs_only_the_first_layers(family: str) -> None:
    model = attached_model(family)
    layers = model.model.layers
    with torch.no_grad():
        expected = full_run(model, [2])[0]
        calls = count_calls(model)
        with early_exit(model, 2):
            scores = full_run(model, [2])[0]
            model.model(**model_inputs(TOKENS, LAYOUT))
    assert torch.equal(scores, expected)
    assert len(calls["model.layers.2"]) == 2
    assert "model.layers.3" not in calls
    assert model.model.layers is layers


def test_early_exit_without_attach_and_restored_after_an_error() -> None:
    model = make_model("llama")
    layers = model.model.layers
    with torch.no_grad():
        hidden = model(TOKENS[None], output_hidden_states=True).hidden_states
        with early_exit(model, 0):
            torch.testing.assert_close(model.model(TOKENS[None]).last_hidden_state, model.model.norm(hidden[1]))
    with pytest.raises(KeyError), early_exit(model, 1):
        raise KeyError
    assert model.model.layers is layers


@pytest.mark.parametrize("layer", [-1, 4])
def test_layer_that_does_not_exist(layer: int) -> None:
    model = attached_model("llama")
    message = rf"layer: expected an index in \[0, 4\), got {layer}"
    with pytest.raises(ValueError, match=message), early_exit(model, layer):
        pass
    with pytest.raises(ValueError, match=message):
        layer_scores(model, TOKENS, LAYOUT, layer, ROWS)


@families
def test_layer_scores_equal_the_full_run(family: str) -> None:
    model = attached_model(family)
    layers = model.model.layers
    with torch.no_grad():
        expected = full_run(model, [0, 1, 2, 3])
        for layer in range(4):
            scores = layer_scores(model, TOKENS, LAYOUT, layer, ROWS)
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, expected[layer], atol=1e-5, rtol=1e-5)
    assert model.model.layers is layers


@families
def test_layer_scores_equal_eager_probabilities(family: str) -> None:
    model, stock = attached_model(family, sliding_window=4096), make_model(family, sliding_window=4096)
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        scores = layer_scores(model, TOKENS, LAYOUT, 2, ROWS)
        probabilities = stock(**dense_inputs(stock, TOKENS, LAYOUT), output_attentions=True).attentions[2][0]
    for index, row in enumerate(ROWS.tolist()):
        documents = LAYOUT.segments()[index // 2][1:-1]
        mass = torch.stack([probabilities[:, row, a:b].sum(-1) for a, b, _ in documents], dim=-1)
        share = torch.softmax(scores[index, :, : len(documents)], dim=-1)
        torch.testing.assert_close(share, mass / mass.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)


@families
def test_only_the_keys_and_the_signal_queries_of_the_last_layer_are_computed(family: str) -> None:
    model = attached_model(family)
    calls = count_calls(model)
    layer_scores(model, TOKENS, LAYOUT, 2, ROWS)
    inside = {name: shapes for name, shapes in calls.items() if ".layers.2." in name}
    names = {name.rsplit(".", 1)[1] for name in inside}
    tokens, rows = torch.Size([1, LAYOUT.num_tokens, 64]), torch.Size([1, ROWS.numel(), 64])
    assert names <= {"q_proj", "k_proj", "q_norm", "k_norm", "input_layernorm"}
    if family != "phi3":  # whose fused projection is sliced, not called
        assert inside["model.layers.2.self_attn.q_proj"] == [rows]
        assert inside["model.layers.2.self_attn.k_proj"] == [tokens]
    assert "model.layers.1.mlp" in calls
    assert "model.layers.3" not in calls
    assert "lm_head" not in calls


@families
def test_gradients_equal_those_of_the_full_run(family: str) -> None:
    model = attached_model(family)

    def gradients(scores: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        scores.masked_fill(scores.isinf(), 0.0).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}

    ours = gradients(layer_scores(model, TOKENS, LAYOUT, 2, ROWS))
    theirs = gradients(full_run(model, [2])[0])
    assert ours.keys() == theirs.keys()
    assert any(".layers.2." in name for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=2e-5 * theirs[name].abs().max().item(), rtol=0)


@pytest.mark.parametrize("family", ["llama", "olmo3", "phi3"])
def test_lora_adapters_count(family: str) -> None:
    targets = ["qkv_proj"] if family == "phi3" else ["q_proj", "k_proj"]
    plain = layer_scores(attached_model(family), TOKENS, LAYOUT, 2, ROWS)
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, layers_to_transform=[2])
    model = peft.get_peft_model(attached_model(family), config)
    scores = layer_scores(model, TOKENS, LAYOUT, 2, ROWS)
    assert (scores - plain).nan_to_num(0.0).abs().max() > 1e-3
    torch.testing.assert_close(scores, full_run(model, [2])[0], atol=1e-5, rtol=1e-5)
    scores.masked_fill(scores.isinf(), 0.0).sum().backward()
    adapters = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(adapters) == 2 * len(targets)
    with model.disable_adapter():
        torch.testing.assert_close(layer_scores(model, TOKENS, LAYOUT, 2, ROWS), plain)


def test_lower_layers_under_gradient_checkpointing() -> None:
    model = attached_model("llama")

    def gradient() -> torch.Tensor:
        scores = layer_scores(model, TOKENS, LAYOUT, 2, ROWS)
        weight = model.model.layers[0].self_attn.v_proj.weight
        return torch.autograd.grad(scores.masked_fill(scores.isinf(), 0.0).sum(), weight)[0]

    expected = gradient()
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    torch.testing.assert_close(gradient(), expected)


class _OtherAttention(transformers.models.llama.modeling_llama.LlamaAttention):
    """A subclass whose forward rankernel has not seen."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return super().forward(hidden_states * 0.5, **kwargs)


@pytest.mark.parametrize("case", ["another family", "overridden forward", "wrapped forward"])
def test_attention_that_is_not_known_exactly_runs_in_full(case: str) -> None:
    if case == "another family":
        config = transformers.SmolLM3Config(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, no_rope_layers=[1, 0, 1, 0], pad_token_id=0, initializer_range=0.1,
        )  # fmt: skip
        model = transformers.SmolLM3ForCausalLM(config).eval()
    else:
        model = make_model("llama")
    for layer in model.model.layers:
        if case == "overridden forward":
            layer.self_attn.__class__ = _OtherAttention
        if case == "wrapped forward":
            layer.forward = layer.forward
    attach(model)
    calls = count_calls(model)
    with torch.no_grad():
        scores = layer_scores(model, TOKENS, LAYOUT, 1, ROWS)
        assert "model.layers.2" not in calls
        assert "lm_head" not in calls
        torch.testing.assert_close(scores, full_run(model, [1])[0])


def test_autocast() -> None:
    model = attached_model("llama")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        scores = layer_scores(model, TOKENS, LAYOUT, 2, ROWS)
        torch.testing.assert_close(scores, full_run(model, [2])[0], atol=5e-2, rtol=5e-2)


def test_positions() -> None:
    model = attached_model("llama")
    sequential = LAYOUT.position_ids("sequential")
    with torch.no_grad():
        by_scheme = layer_scores(model, TOKENS, LAYOUT, 1, ROWS, position_scheme="sequential")
        by_ids = layer_scores(model, TOKENS, LAYOUT, 1, ROWS, position_ids=sequential)
        shared = layer_scores(model, TOKENS, LAYOUT, 1, ROWS, tail_offset=300)
    assert torch.equal(by_scheme, by_ids)
    assert not torch.equal(by_scheme, shared)


def test_needs_an_attached_model() -> None:
    model = make_model("llama")
    with pytest.raises(ValueError, match="expected an attached model"):
        layer_scores(model, TOKENS, LAYOUT, 1, ROWS)
    with attached(model):
        layer_scores(model, TOKENS, LAYOUT, 1, ROWS)
    with attached(model), pytest.raises(ValueError, match="rows: expected"):
        layer_scores(model, TOKENS, LAYOUT, 1, ROWS[None])
    assert len(model.model.layers) == 4
