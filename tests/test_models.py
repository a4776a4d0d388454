"""attach, detach and what an attached model computes, against stock Transformers on eleven families."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers

from rankernel.layout import BlockLayout
from rankernel.models import AttachReport, ScoreRequest, attach, attached, detach, model_inputs
from rankernel.models import attention as attention_module
from tiny_models import FAMILIES, WINDOW, dense_inputs, make_model, random_tokens

TWO_LISTS = BlockLayout.from_lengths([(4, [7, 2, 7], 6), (3, [6, 1], 5)])
TOKENS = random_tokens(TWO_LISTS.num_tokens)

families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def stock_eager(family: str, **overrides: Any) -> Any:
    model = make_model(family, **overrides)
    model.set_attn_implementation("eager")
    return model


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], rtol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = theirs[name].abs().max()
        assert (gradient - theirs[name]).abs().max() <= rtol * scale + 1e-7, name


def checkpoint_activations(model: Any, use_reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def language_loss(logits: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[0, :-1], TOKENS[1:])


# What is computed with a layout


@families
@pytest.mark.parametrize("pattern", ["block", "causal"])
def test_equals_stock_eager_with_dense_mask(family: str, pattern: Any) -> None:
    layout = BlockLayout.from_lengths(TWO_LISTS.lengths, pattern)
    model = make_model(family)
    stock = stock_eager(family)
    with attached(model), torch.no_grad():
        ours = model(**model_inputs(TOKENS, layout)).logits
        theirs = stock(**dense_inputs(stock, TOKENS, layout)).logits
    assert (ours - theirs).abs().max() <= 1e-5
    assert theirs.abs().max() > 0.1


@pytest.mark.parametrize(
    ("family", "without"),
    [
        *((family, {"sliding_window": 4096}) for family in FAMILIES if family not in ("llama", "granite")),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("granite", {"attention_multiplier": 0.25}),
    ],
)
def test_reference_depends_on_what_sets_the_family_apart(family: str, without: dict[str, Any]) -> None:
    model, other = stock_eager(family), stock_eager(family, **without)
    with torch.no_grad():
        logits, different = (m(**dense_inputs(m, TOKENS, TWO_LISTS)).logits for m in (model, other))
    assert (logits - different).abs().max() > 1e-3


def test_sinks_matter() -> None:
    model = make_model("gpt_oss")
    attach(model)
    with torch.no_grad():
        before = model(**model_inputs(TOKENS, TWO_LISTS)).logits
        model.model.layers[0].self_attn.sinks += 1.0
        after = model(**model_inputs(TOKENS, TWO_LISTS)).logits
    assert (before - after).abs().max() > 1e-3


@families
def test_gradients_equal_stock_eager(family: str) -> None:
    model, stock = make_model(family), stock_eager(family)
    attach(model)
    ours = gradients(model, language_loss(model(**model_inputs(TOKENS, TWO_LISTS)).logits))
    theirs = gradients(stock, language_loss(stock(**dense_inputs(stock, TOKENS, TWO_LISTS)).logits))
    assert_same_gradients(ours, theirs, rtol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_gradient_checkpointing(family: str) -> None:
    model = make_model(family)
    attach(model)
    inputs = model_inputs(TOKENS, TWO_LISTS, scores=ScoreRequest([1, 3], TWO_LISTS.tail_positions(2)))

    def loss() -> torch.Tensor:
        outputs = model(**inputs)
        scores = torch.stack(outputs.attentions).masked_fill(torch.stack(outputs.attentions).isinf(), 0.0)
        return language_loss(outputs.logits) + scores.square().mean()

    plain = gradients(model, loss())
    model.train()
    checkpoint_activations(model, use_reentrant=False)
    assert_same_gradients(gradients(model, loss()), plain, rtol=1e-6)


def test_reentrant_checkpointing_raises_instead_of_losing_score_gradients() -> None:
    model = make_model("llama").train()
    attach(model)
    checkpoint_activations(model, use_reentrant=True)
    inputs = model_inputs(TOKENS, TWO_LISTS, scores=ScoreRequest([1], TWO_LISTS.tail_positions()))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(**inputs)
    with torch.no_grad():
        assert len(model(**inputs).attentions) == 1


def test_scores_without_gradient_are_fine_where_there_is_nothing_to_train() -> None:
    model = make_model("llama").train()
    attach(model)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[:2].requires_grad_(False)
    inputs = model_inputs(TOKENS, TWO_LISTS, scores=ScoreRequest([1], TWO_LISTS.tail_positions()))
    outputs = model(**inputs)
    assert outputs.logits.requires_grad
    assert not outputs.attentions[0].requires_grad


def test_autocast() -> None:
    model, stock = make_model("llama"), stock_eager("llama")
    attach(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours = model(**model_inputs(TOKENS, TWO_LISTS)).logits
        theirs = stock(**dense_inputs(stock, TOKENS, TWO_LISTS)).logits
    with torch.no_grad():
        exact = stock(**dense_inputs(stock, TOKENS, TWO_LISTS)).logits
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-3


def test_bfloat16_weights() -> None:
    model = make_model("qwen3").bfloat16()
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("eager")
    exact = copy.deepcopy(stock).float()
    attach(model)
    inputs = dense_inputs(stock, TOKENS, TWO_LISTS)
    with torch.no_grad():
        ours = model(**model_inputs(TOKENS, TWO_LISTS)).logits
        theirs, truth = stock(**inputs).logits, exact(**inputs).logits
    assert ours.dtype == torch.bfloat16
    assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-3


def test_query_key_and_value_reach_the_kernel_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen.extend((query, key, value))
        return query

    monkeypatch.setattr(attention_module, "block_attention", spy)
    tensors = [torch.randn(1, heads, TWO_LISTS.num_tokens, 16) for heads in (4, 2, 2)]
    attention_module.attention_forward(torch.nn.Identity(), *tensors, None, block_layout=TWO_LISTS)
    assert [tensor.data_ptr() for tensor in seen] == [tensor.data_ptr() for tensor in tensors]


def test_generate_continues_from_a_packed_prefill() -> None:
    layout = BlockLayout.from_lengths([(4, [7, 2, 7], 6)])
    tokens, model, stock = random_tokens(layout.num_tokens), make_model("qwen3"), stock_eager("qwen3")
    attach(model)
    head = BlockLayout.from_lengths([(4, [7, 2, 7], 5)])
    cache = transformers.DynamicCache()
    inputs = model_inputs(tokens[:-1], head) | {"use_cache": True, "past_key_values": cache}
    with torch.no_grad():
        model(**inputs)
        ours = model.generate(
            tokens[None], past_key_values=cache, position_ids=layout.position_ids()[None], max_new_tokens=4,
            do_sample=False, eos_token_id=-1,
        )  # fmt: skip
        row = tokens
        for new in range(4):
            grown = BlockLayout.from_lengths([(4, [7, 2, 7], 6 + new)])
            logits = stock(**dense_inputs(stock, row, grown)).logits
            row = torch.cat([row, logits[0, -1:].argmax(-1)])
    assert ours[0].tolist() == row.tolist()


# What is computed without a layout


@families
@pytest.mark.parametrize("implementation", ["default", "eager"])
def test_unchanged_without_a_layout(family: str, implementation: str) -> None:
    model = make_model(family) if implementation == "default" else stock_eager(family)
    if implementation == "eager" and make_model(family).config._attn_implementation == "eager":
        pytest.skip("eager is the default")
    tokens = random_tokens(2, 14)
    padding = torch.ones_like(tokens)
    padding[0, :5] = 0

    def everything() -> list[torch.Tensor]:
        results = [model(tokens).logits, model(tokens, attention_mask=padding).logits]
        results += [model(tokens, use_cache=False, position_ids=torch.arange(14).remainder(7)[None]).logits]
        for options in ({}, {"cache_implementation": "static"}):
            out = model.generate(
                tokens, attention_mask=padding, max_new_tokens=5, do_sample=False, return_dict_in_generate=True,
                output_logits=True, eos_token_id=-1, **options,
            )  # fmt: skip
            results += [out.sequences, *out.logits]
            whole = model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=-1, **options)
            results.append(whole)
        if implementation == "eager":
            results += model(tokens, output_attentions=True).attentions
        return results

    with torch.no_grad():
        before = everything()
        attach(model)
        during = everything()
        detach(model)
        after = everything()
    for results in (during, after):
        assert all(torch.equal(a, b) for a, b in zip(before, results, strict=True))


# Scores


@families
def test_scores_equal_eager_probabilities(family: str) -> None:
    """Softmax over documents of the scores is the share of the row's attention to documents that each one gets."""
    model, stock = make_model(family, sliding_window=4096), stock_eager(family, sliding_window=4096)
    attach(model)
    rows = TWO_LISTS.tail_positions(2)
    with torch.no_grad():
        scores = model(**model_inputs(TOKENS, TWO_LISTS, scores=ScoreRequest([3, 0], rows))).attentions
        probabilities = stock(**dense_inputs(stock, TOKENS, TWO_LISTS), output_attentions=True).attentions
    assert len(scores) == 2
    for layer, ours in zip((0, 3), scores, strict=True):
        assert ours.shape == (4, 4, 3)
        assert ours.dtype == torch.float32
        for index, row in enumerate(rows.tolist()):
            documents = TWO_LISTS.segments()[index // 2][1:-1]
            mass = torch.stack([probabilities[layer][0, :, row, a:b].sum(-1) for a, b, _ in documents], dim=-1)
            expected = mass / mass.sum(-1, keepdim=True)
            torch.testing.assert_close(
                torch.softmax(ours[index], dim=-1)[:, : len(documents)], expected, atol=1e-5, rtol=1e-4
            )


def test_gradient_flows_through_output_attentions() -> None:
    model, stock = make_model("qwen3"), stock_eager("qwen3")
    attach(model)
    row = TWO_LISTS.segments()[0][-1][1] - 1
    scores = model(**model_inputs(TOKENS, TWO_LISTS, scores=ScoreRequest([3], torch.tensor([row])))).attentions[0]
    ours = gradients(model, -torch.log_softmax(scores[0], dim=-1)[:, 1].mean())
    probabilities = stock(**dense_inputs(stock, TOKENS, TWO_LISTS), output_attentions=True).attentions[3][0, :, row]
    documents = TWO_LISTS.segments()[0][1:-1]
    mass = torch.stack([probabilities[:, a:b].sum(-1) for a, b, _ in documents], dim=-1)
    theirs = gradients(stock, -torch.log(mass[:, 1] / mass.sum(-1)).mean())
    theirs = {name: gradient for name, gradient in theirs.items() if name in ours}
    assert "model.layers.3.self_attn.q_proj.weight" in ours
    assert_same_gradients(ours, theirs, rtol=5e-5)


# attach and detach


def snapshot(model: torch.nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {"config": dict(vars(model.config)) if hasattr(model, "config") else None}
    for name, module in model.named_modules():
        state[name] = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
    return state


@families
def test_detach_leaves_no_trace(family: str) -> None:
    model = make_model(family)
    before, saved = snapshot(model), model.config.to_json_string()
    report = attach(model)
    assert model.config._attn_implementation == "rankernel"
    assert model.config.to_json_string() == saved
    assert report.previous == before["config"]["_attn_implementation_internal"]
    detach(model)
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before)


def test_attach_twice_and_nested() -> None:
    model = make_model("gpt_oss")
    report = attach(model)
    assert attach(model) == report
    with attached(model) as inner:
        assert inner == report
    assert model.config._attn_implementation == "rankernel"
    detach(model)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="expected an attached model"):
        detach(model)
    with pytest.raises(KeyError), attached(model):
        raise KeyError
    assert model.config._attn_implementation == "eager"


def test_model_switched_to_another_attention_after_attach() -> None:
    model = make_model("llama")
    before = snapshot(model)
    attach(model)
    model.set_attn_implementation("eager")
    assert attach(model).previous == "eager"
    assert len(model.model._forward_hooks) == 1
    model.set_attn_implementation("sdpa")
    detach(model)
    assert snapshot(model) == before


def test_report() -> None:
    report = attach(make_model("gemma3"))
    assert report == AttachReport("Gemma3ForCausalLM", "Gemma3Attention", "sdpa", (None, WINDOW, WINDOW, None))
    assert "4 layers of Gemma3Attention" in str(report)
    assert "layers 1, 2: counted in the packed row" in str(report)
    assert attach(make_model("mistral")).windows == (WINDOW,) * 4
    assert attach(make_model("llama")).windows == (None,) * 4


def test_copy_of_an_attached_model_is_attached() -> None:
    model = make_model("gpt_oss")
    attach(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(**model_inputs(TOKENS, TWO_LISTS)).logits
        detach(model)
        assert torch.equal(other(**model_inputs(TOKENS, TWO_LISTS)).logits, expected)
        assert torch.equal(other(TOKENS[None]).logits, model(TOKENS[None]).logits)
    detach(other)
    assert not other.model._forward_hooks


class Wrapper(torch.nn.Module):
    """Holds its model as DistributedDataParallel does."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **kwargs: Any) -> Any:
        return self.module(**kwargs)


def test_wrapped_models() -> None:
    plain = make_model("llama")
    attach(plain)
    with torch.no_grad():
        expected = plain(**model_inputs(TOKENS, TWO_LISTS)).logits
    wrappers: list[Callable[[Any], Any]] = [
        Wrapper,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])),
        lambda model: Wrapper(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))),
    ]
    for wrap in wrappers:
        model = make_model("llama")
        wrapper = wrap(model)
        assert attach(wrapper).model_class == "LlamaForCausalLM"
        with torch.no_grad():
            torch.testing.assert_close(wrapper(**model_inputs(TOKENS, TWO_LISTS)).logits, expected)
        detach(wrapper)
        assert model.config._attn_implementation == "sdpa"


def test_peft_model_trains_adapters() -> None:
    def adapted(model: Any) -> Any:
        torch.manual_seed(1)
        config = peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config)

    model, stock = adapted(make_model("qwen2")), adapted(stock_eager("qwen2"))
    attach(model)
    ours = gradients(model, language_loss(model(**model_inputs(TOKENS, TWO_LISTS)).logits))
    theirs = gradients(stock, language_loss(stock(**dense_inputs(stock, TOKENS, TWO_LISTS)).logits))
    assert all("lora" in name for name in ours)
    assert_same_gradients(ours, theirs, rtol=2e-5)


def test_multimodal_model_switches_only_its_text_tower() -> None:
    text = make_model("gemma3").config
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4
    )
    model, stock = (transformers.Gemma3ForConditionalGeneration(copy.deepcopy(config)).eval() for _ in range(2))
    stock.load_state_dict(model.state_dict())
    stock.set_attn_implementation("eager")
    attach(model)
    assert model.config.text_config._attn_implementation == "rankernel"
    assert model.config.vision_config._attn_implementation == "sdpa"
    stock_inputs = dense_inputs(make_model("gemma3"), TOKENS, TWO_LISTS)
    with torch.no_grad():
        ours = model(**model_inputs(TOKENS, TWO_LISTS)).logits
        theirs = stock.model.language_model(**stock_inputs).last_hidden_state
    assert (ours - stock.lm_head(theirs)).abs().max() <= 1e-5
    detach(model)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_torch_compile_gives_one_graph_for_all_layouts_of_a_length() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model = make_model("llama", num_hidden_layers=2)
    attach(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for lengths in ([(4, [7, 2, 7], 6), (3, [6, 1], 5)], [(9, [1, 4, 2, 8, 2], 15)], [(0, [], 1), (20, [], 20)]):
        inputs = model_inputs(TOKENS, BlockLayout.from_lengths(lengths))
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_torch_compile_with_scores_and_gradients() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model = make_model("llama", num_hidden_layers=2)
    attach(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def graphs_after(*lengths: Any) -> int:
        layout = BlockLayout.from_lengths(lengths)
        tokens = random_tokens(layout.num_tokens)
        inputs = model_inputs(tokens, layout, scores=ScoreRequest([1], layout.tail_positions(2)))
        expected = model(**inputs)  # first, as Transformers installs its output hooks under a lock
        ours = compiled(**inputs)
        torch.testing.assert_close(ours.logits, expected.logits)
        torch.testing.assert_close(ours.attentions, expected.attentions)
        weight = model.model.layers[0].self_attn.k_proj.weight
        losses = [out.logits.square().mean() + out.attentions[0][0, :, 0].sum() for out in (ours, expected)]
        torch.testing.assert_close(*(torch.autograd.grad(loss, weight) for loss in losses))
        return counter.frame_count

    assert graphs_after((4, [7, 2, 7], 6), (3, [6, 1], 5)) == 1
    assert graphs_after((2, [5, 6, 3], 8), (1, [1, 9], 6)) == 1
    # Sizes that change become dynamic once: tokens, signal rows and documents of the largest list.
    assert graphs_after((4, [7, 2, 7, 3], 6), (3, [6, 3], 5), (1, [2], 2)) == 2
    assert graphs_after((9, [5, 3, 3, 2, 1, 1], 4), (1, [1, 9], 6)) == 2
    torch._dynamo.reset()


# Errors


def test_refuses_models_that_mix_tokens_outside_attention() -> None:
    config = transformers.Qwen3NextConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, layer_types=["linear_attention", "full_attention"], num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    )  # fmt: skip
    model = transformers.Qwen3NextForCausalLM(config)
    implementation = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"linear_attention.*documents would see each other"):
        attach(model)
    assert model.config._attn_implementation == implementation
    mamba = transformers.MambaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="model: "):
        attach(transformers.MambaForCausalLM(mamba))


def test_refuses_other_models() -> None:
    with pytest.raises(ValueError, match="expected a Hugging Face decoder"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="both directions"):
        attach(make_model("gemma3", use_bidirectional_attention=True))
    model = make_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        attach(model)
    model.config._attn_implementation = "rankernel"
    with pytest.raises(ValueError, match="'rankernel'"):
        attach(model)


def test_refuses_models_that_ignore_the_attention_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    monkeypatch.setattr(type(model.model), "_can_set_attn_implementation_cached_value", False, raising=False)
    with pytest.raises(ValueError, match="AttentionInterface"):
        attach(model)
    assert not hasattr(model.model.layers[0].self_attn, attention_module.STOCK_ATTRIBUTE)


def test_implementation_set_without_attach() -> None:
    attach(make_model("llama"))
    model = make_model("llama")
    model.set_attn_implementation("rankernel")
    with pytest.raises(ValueError, match=r"without rankernel\.attach"):
        model(TOKENS[None])


def test_model_that_is_not_attached_fails_instead_of_ignoring_the_layout() -> None:
    for model in (make_model("llama"), stock_eager("llama")):
        with pytest.raises(RuntimeError), torch.no_grad():
            model(**model_inputs(TOKENS, TWO_LISTS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": TOKENS.expand(2, -1)}, "batch of 1"),
        (
            {"input_ids": TOKENS[None, :-1], "position_ids": torch.arange(TOKENS.numel() - 1)[None]},
            "expected 41 tokens",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 41])}, "cu_seq_lens_q: expected None"),
        ({"block_layout": None, "block_scores": ScoreRequest([0], torch.tensor([0]))}, "together with block_layout"),
        ({"block_scores": ScoreRequest([4], torch.tensor([0])), "output_attentions": True}, "layers below 4"),
        ({"cache": object()}, "continuous batching"),
    ],
)
def test_inputs_that_a_layout_excludes(change: dict[str, Any], message: str) -> None:
    model = make_model("llama")
    attach(model)
    with pytest.raises(ValueError, match=message):
        model(**model_inputs(TOKENS, TWO_LISTS) | change)


def test_filled_cache_is_refused() -> None:
    model = make_model("llama")
    attach(model)
    cache = transformers.DynamicCache()
    model(TOKENS[None, :3], past_key_values=cache)
    with pytest.raises(ValueError, match=r"past_key_values: .*got keys for 44"):
        model(**model_inputs(TOKENS, TWO_LISTS) | {"past_key_values": cache, "use_cache": True})


def test_dropout_is_refused_only_in_training() -> None:
    model = make_model("llama", attention_dropout=0.1)
    attach(model)
    model(**model_inputs(TOKENS, TWO_LISTS))
    with pytest.raises(ValueError, match=r"attention_dropout: expected 0 .*, got 0\.1"):
        model.train()(**model_inputs(TOKENS, TWO_LISTS))
    model.train()(TOKENS[None])


def test_model_inputs() -> None:
    request = ScoreRequest([2, 0, 2], TWO_LISTS.tail_positions())
    inputs = model_inputs(TOKENS, TWO_LISTS, scores=request)
    assert inputs["input_ids"].shape == inputs["position_ids"].shape == (1, 41)
    assert torch.equal(inputs["position_ids"][0], TWO_LISTS.position_ids("shared", 16384))
    assert inputs["block_layout"] is TWO_LISTS
    assert inputs["attention_mask"].dim() == 4
    assert inputs["block_scores"].layers == (0, 2)
    assert inputs["output_attentions"] is True
    assert inputs["use_cache"] is False
    plain = model_inputs(TOKENS[None], TWO_LISTS, position_scheme="sequential")
    assert torch.equal(plain["position_ids"][0], TWO_LISTS.position_ids("sequential"))
    assert "output_attentions" not in plain
    assert torch.equal(model_inputs(TOKENS, TWO_LISTS, position_ids=TOKENS)["position_ids"], TOKENS[None])
    with pytest.raises(ValueError, match=r"input_ids: expected shape \[41\] or \[1, 41\] as in layout, got \[40\]"):
        model_inputs(TOKENS[1:], TWO_LISTS)
    with pytest.raises(ValueError, match="position_ids"):
        model_inputs(TOKENS, TWO_LISTS, position_ids=TOKENS[1:])


@pytest.mark.parametrize(("layers", "rows"), [([], [0]), ([-1], [0]), ([0], [[0]]), ([0], [0.5]), ([0], [True])])
def test_score_request_checks(layers: list[int], rows: list[Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=r"layers: expected|rows: expected"):
        ScoreRequest(layers, torch.tensor(rows))


@pytest.mark.parametrize("row", [-1, 41])
def test_rows_outside_the_layout(row: int) -> None:
    with pytest.raises(ValueError, match=r"scores: expected rows in \[0, 41\)"):
        model_inputs(TOKENS, TWO_LISTS, scores=ScoreRequest([0], torch.tensor([3, row])))


def test_layout_that_is_none() -> None:
    model = make_model("llama")
    attach(model)
    with pytest.raises(TypeError, match="block_layout: expected a BlockLayout, got dict"):
        model(**model_inputs(TOKENS, TWO_LISTS) | {"block_layout": {}})


def test_import_does_not_need_transformers() -> None:
    code = "import sys, rankernel.models; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
