"""Candidate scores and packed prompts against the stock model's own full logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification, PhiConfig, PhiForCausalLM

from rankernel import BlockLayout
from rankernel.models import attach, final_hidden_states, head_of, model_inputs, pack_prompts
from rankernel.models.packing import shared_length
from tiny_models import FAMILIES, VOCABULARY, WINDOW, make_model, random_tokens

CANDIDATES = torch.tensor([5, 90, 5, 0])
EXTRA: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 0.7},
    "gemma3": {"final_logit_softcapping": 0.7},
    "cohere2": {"logit_scale": 3.0},
    "granite": {"logits_scaling": 0.25},
}
"""What a family does to its logits, strong enough to show."""


def prompts_of(*lengths: int, shared: int = 6) -> list[list[int]]:
    beginning = random_tokens(shared, seed=99).tolist()
    return [beginning + random_tokens(length, seed=length).tolist() for length in lengths]


def own_logits(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """The stock model's logits behind every prompt, one at a time: [prompts, V]."""
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([p]), use_cache=False).logits[0, -1] for p in prompts]).float()


def packed_hidden(model: Any, groups: list[list[list[int]]], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(
            [
                final_hidden_states(
                    model, row.ends, **model_inputs(row.input_ids, row.layout, position_ids=row.position_ids)
                )
                for row in pack_prompts(groups, **options)
            ]
        )


def window_of(model: Any) -> int | None:
    return min((window for window in attach(model).windows if window is not None), default=None)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_prompts_give_the_models_own_logits(family, tied):
    options = {"tie_word_embeddings": tied, **EXTRA.get(family, {})}
    prompts = prompts_of(3, 9, 1, 5, 20)
    expected = own_logits(make_model(family, **options), prompts)
    model = make_model(family, **options)
    hidden = packed_hidden(model, [prompts], window=window_of(model))
    head = head_of(model)
    torch.testing.assert_close(head.candidate_logits(hidden, CANDIDATES), expected[:, CANDIDATES], rtol=0, atol=1e-5)
    log_probs = head.candidate_logits(hidden, CANDIDATES, log_probs=True)
    torch.testing.assert_close(log_probs, expected.log_softmax(-1)[:, CANDIDATES], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_stock_models_are_scored_too(family):
    model = make_model(family, **EXTRA.get(family, {}))
    tokens = random_tokens(2, 7)
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
        hidden = final_hidden_states(model, torch.tensor([13, 4, 4]), input_ids=tokens, use_cache=False)
    actual = head_of(model).candidate_logits(hidden, CANDIDATES)
    torch.testing.assert_close(actual, expected[[13, 4, 4]][:, CANDIDATES], rtol=0, atol=1e-5)
    with torch.no_grad():
        again = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    assert torch.equal(again, expected), "something was left behind on the last layer"


def test_gradients_reach_the_weights_through_scored_rows():
    model, stock = make_model("qwen3"), make_model("qwen3")
    tokens, rows = random_tokens(1, 12), torch.tensor([11, 5])
    attach(model)
    layout = BlockLayout.from_lengths([(12, [], 0)])
    hidden = final_hidden_states(model, rows, **model_inputs(tokens, layout))
    head_of(model).candidate_logits(hidden, CANDIDATES).square().sum().backward()
    stock(input_ids=tokens, use_cache=False).logits[0, rows][:, CANDIDATES].square().sum().backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_bias_and_a_family_that_is_not_listed():
    config = PhiConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = PhiForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits[0, [8, 2]]
        hidden = final_hidden_states(model, torch.tensor([8, 2]), input_ids=tokens, use_cache=False)
    head = head_of(model)
    assert head.bias is model.lm_head.bias
    torch.testing.assert_close(head.candidate_logits(hidden, CANDIDATES), expected[:, CANDIDATES], rtol=0, atol=1e-5)
    forward = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = doubled
    with pytest.raises(ValueError, match="PhiForCausalLM does something to its logits that is not known"):
        head_of(model)


@pytest.mark.parametrize("how", ["lora", "modules_to_save", "body"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_peft_heads(family, how):
    options = {"lora": {"target_modules": ["lm_head"]}, "body": {"target_modules": ["q_proj", "down_proj"]}}.get(
        how, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}
    )
    model = get_peft_model(
        make_model(family, tie_word_embeddings=False, **EXTRA.get(family, {})), LoraConfig(r=4, **options)
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits[0, [8, 2]]
        hidden = final_hidden_states(model, torch.tensor([8, 2]), input_ids=tokens, use_cache=False)
        head = head_of(model)
        actual = head.candidate_logits(hidden, CANDIDATES)
        log_probs = head.candidate_logits(hidden, CANDIDATES, log_probs=True)
    assert (head.weight is None) == (how == "lora")
    torch.testing.assert_close(actual, expected[:, CANDIDATES], rtol=0, atol=1e-5)
    torch.testing.assert_close(log_probs, expected.log_softmax(-1)[:, CANDIDATES], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="candidates: expected token ids"):
        head.candidate_logits(hidden, torch.tensor([VOCABULARY]))


def test_a_sequence_classifier_has_a_score_layer():
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    attach(model)
    hidden = packed_hidden(model, [[tokens[0].tolist()]])
    torch.testing.assert_close(head_of(model).candidate_logits(hidden, torch.tensor([0])), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="LlamaModel has none"):
        head_of(model.model)


def test_positions_that_there_are_not():
    model = make_model("llama")
    with pytest.raises(ValueError, match=r"rows: expected positions in \[0, 4\), got \[4\]"):
        final_hidden_states(model, torch.tensor([4]), input_ids=random_tokens(1, 4))


# Packing


@given(
    st.lists(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=6), max_size=5),
    st.integers(1, 30),
    st.none() | st.integers(1, 12),
    st.integers(1, 2),
)
def test_rows_hold_the_prompts(groups, batch_tokens, window, last):
    prompts = [prompt for group in groups for prompt in group]
    found = []
    for row in pack_prompts(groups, batch_tokens=batch_tokens, window=window, last=last):
        assert row.layout.num_tokens == len(row.input_ids)
        assert row.layout.num_tokens <= batch_tokens or row.layout.num_documents == 1
        mask = row.layout.dense_mask()
        if window is not None:
            within = mask & row.layout.dense_mask(window)
            alone = torch.tensor(
                [
                    len(documents) == 1
                    for prefix, documents, _ in row.layout.lengths
                    for _ in range(prefix + sum(documents))
                ]
            )
            assert torch.equal(mask[~alone], within[~alone]), "a prompt lost its beginning behind the window"
        for end in row.ends.tolist():
            seen = mask[end].nonzero()[:, 0]
            assert row.position_ids[seen].tolist() == list(range(len(seen)))
            assert len(set(row.position_ids[seen][-last:].tolist())) == last
            found.append(row.input_ids[seen].tolist())
    assert found == prompts


def test_what_is_shared_runs_once():
    (row,) = pack_prompts([[[1, 2, 3, 4], [1, 2, 5], [1, 2, 3]], [[7, 7]]])
    assert row.layout.lengths == ((2, (2, 1, 1), 0), (0, (2,), 0))
    assert shared_length([[1, 2], [1, 2]]) == 1
    assert shared_length([[1, 2, 3], [1, 2, 3]], last=2) == 1
    assert shared_length([[1, 2, 3]]) == 0


def test_a_window_limits_what_is_shared():
    prompts = [[1, 2, 3, 4, other, 9] for other in range(5, 9)]
    (row,) = pack_prompts([prompts], window=WINDOW)
    assert row.layout.lengths == ((4, (2, 2), 0), (4, (2, 2), 0))


def test_unfit_prompts():
    with pytest.raises(ValueError, match="batch_tokens: expected a positive integer, got 0"):
        list(pack_prompts([], batch_tokens=0))
    with pytest.raises(ValueError, match="expected prompts of at least 2 tokens, got one of 1"):
        list(pack_prompts([[[1]]], last=2))
