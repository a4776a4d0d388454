"""Kept keys and values against the packed prompt of the documents that are left, on eleven families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankernel.layout import BlockLayout
from rankernel.models import attach, final_hidden_states, model_inputs
from rankernel.models.documents import prefill
from tiny_models import FAMILIES, WINDOW, dense_inputs, make_model, random_tokens

PREFIX, LENGTHS, TAIL = 4, [7, 0, 2, 11, 1, 7], 6
TOKENS = random_tokens(PREFIX + sum(LENGTHS))
TAILS = random_tokens(3, TAIL, seed=1)
LAYOUT = BlockLayout.from_lengths([(PREFIX, LENGTHS, 0)])
OFFSET = PREFIX + max(LENGTHS)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 0.5 * pair for pair in range(8)],
}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}

families = pytest.mark.parametrize("family", FAMILIES)


pytestmark = pytest.mark.usefixtures("one_thread")


def attached_model(family: str, **overrides: Any) -> Any:
    model = make_model(family, **{"sliding_window": 4096, **overrides})
    attach(model)
    return model


def packed_prompt(left: list[int], tail: torch.Tensor) -> tuple[torch.Tensor, BlockLayout]:
    prefix, *documents = TOKENS.split([PREFIX, *LENGTHS])
    layout = BlockLayout.from_lengths([(PREFIX, [LENGTHS[document] for document in left], len(tail))])
    return torch.cat([prefix, *(documents[document] for document in left), tail]), layout


@torch.no_grad()
def packed(model: Any, left: list[int], tail: torch.Tensor, tail_offset: int = OFFSET) -> torch.Tensor:
    tokens, layout = packed_prompt(left, tail)
    last = torch.tensor([layout.num_tokens - 1])
    return final_hidden_states(model, last, **model_inputs(tokens, layout, tail_offset=tail_offset))


@torch.no_grad()
def stock(model: Any, left: list[int], tail: torch.Tensor) -> torch.Tensor:
    tokens, layout = packed_prompt(left, tail)
    positions = layout.position_ids("shared", OFFSET)[None]
    return model.model(**dense_inputs(model, tokens, layout) | {"position_ids": positions}).last_hidden_state[0, -1:]


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@families
def test_tails_are_those_of_the_packed_prompt_without_the_removed_documents(family: str) -> None:
    model = attached_model(family)
    unattached = make_model(family, sliding_window=4096)
    unattached.set_attn_implementation("eager")
    context = prefill(model, TOKENS, LAYOUT, tail_room=TAIL)
    left = list(range(len(LENGTHS)))
    before = None
    for gone in (None, 3, 0, 5, 1, 4, 2):
        if gone is not None:
            context.remove(gone)
            left.remove(gone)
        hidden = context.tail(TAILS[0])
        assert context.documents == left
        assert hidden.shape == (1, model.config.hidden_size)
        assert_same(hidden, packed(model, left, TAILS[0]))
        assert_same(hidden, stock(unattached, left, TAILS[0]))
        if gone not in (None, 1):  # document 1 is empty
            assert (hidden - before).abs().max() > 1e-3
        before = hidden


@given(st.permutations(range(len(LENGTHS))), st.integers(1, TAIL), st.integers(OFFSET, 200))
def test_any_order_tail_and_offset(order: list[int], length: int, tail_offset: int) -> None:
    model = attached_model("llama")
    context = prefill(model, TOKENS, LAYOUT, tail_room=TAIL, tail_offset=tail_offset)
    for gone in order[:4]:
        context.remove(gone)
    left = sorted(order[4:])
    assert_same(context.tail(TAILS[1, :length]), packed(model, left, TAILS[1, :length], tail_offset))


def test_tails_do_not_see_each_other() -> None:
    context = prefill(attached_model("qwen3"), TOKENS, LAYOUT, tail_room=TAIL)
    first = context.tail(TAILS[0])
    for tail in (TAILS[1], TAILS[2, :1], TAILS[2].tolist()):
        context.tail(tail)
    assert torch.equal(context.tail(TAILS[0]), first)


def test_a_failing_tail_leaves_no_trace() -> None:
    model = attached_model("llama")
    context = prefill(model, TOKENS, LAYOUT, tail_room=TAIL)
    expected = context.tail(TAILS[0])

    def fail(*_: Any) -> None:
        raise KeyError

    handle = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        context.tail(TAILS[1])
    handle.remove()
    assert torch.equal(context.tail(TAILS[0]), expected)


def test_keys_and_values_are_stored_once() -> None:
    context = prefill(attached_model("llama"), TOKENS, LAYOUT, tail_room=TAIL)
    layers = context._cache.layers
    places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in layers]
    context.tail(TAILS[0])
    context.remove(0)
    context.tail(TAILS[0])
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in layers] == places
    assert all(layer.keys.shape[2] == LAYOUT.num_tokens - LENGTHS[0] for layer in layers)


def test_documents_run_once_and_most_of_the_last_layer_not_at_all() -> None:
    model = attached_model("llama")
    rows: dict[int, list[int]] = {0: [], 3: []}
    for index, seen in rows.items():
        model.model.layers[index].mlp.gate_proj.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].shape[1])
        )
    context = prefill(model, TOKENS, LAYOUT, tail_room=TAIL)
    context.tail(TAILS[0])
    context.remove(2)
    context.tail(TAILS[0])
    assert rows == {0: [LAYOUT.num_tokens, TAIL, TAIL], 3: [1, 1, 1]}


@pytest.mark.parametrize("lengths", [(5, []), (0, [3, 2]), (0, [4])])
def test_no_prefix_or_no_documents(lengths: tuple[int, list[int]]) -> None:
    model = attached_model("llama")
    tokens = TOKENS[: lengths[0] + sum(lengths[1])]
    layout = BlockLayout.from_lengths([(*lengths, 0)])
    hidden = prefill(model, tokens[None], layout, tail_room=TAIL).tail(TAILS[0])
    with_tail = BlockLayout.from_lengths([(*lengths, TAIL)])
    inputs = model_inputs(torch.cat([tokens, TAILS[0]]), with_tail, tail_offset=lengths[0] + max(lengths[1], default=0))
    with torch.no_grad():
        assert_same(hidden, model.model(**inputs).last_hidden_state[0, -1:])


def test_nothing_left_but_the_tail() -> None:
    model = attached_model("llama")
    layout = BlockLayout.from_lengths([(0, [3, 2], 0)])
    context = prefill(model, TOKENS[:5], layout, tail_room=TAIL)
    context.remove(1)
    context.remove(0)
    with torch.no_grad():
        alone = make_model("llama").model(TAILS[:1], position_ids=torch.arange(3, 3 + TAIL)[None])
    assert_same(context.tail(TAILS[0]), alone.last_hidden_state[0, -1:])


@pytest.mark.parametrize("family", ["mistral", "gemma2", "phi3", "gpt_oss"])
def test_windows_that_act_are_refused(family: str) -> None:
    total = LAYOUT.num_tokens + TAIL
    for window in (WINDOW, total - 1):
        with pytest.raises(ValueError, match=f"sliding window of {window} tokens acts within the prompt's {total}"):
            prefill(attached_model(family, sliding_window=window), TOKENS, LAYOUT, tail_room=TAIL)
    model = attached_model(family, sliding_window=total)
    context = prefill(model, TOKENS, LAYOUT, tail_room=TAIL)
    assert_same(context.tail(TAILS[0]), packed(model, list(range(len(LENGTHS))), TAILS[0]))


@pytest.mark.parametrize(
    ("family", "rope", "limit"),
    [
        ("phi3", LONGROPE, "original_max_position_embeddings"),
        ("llama", DYNAMIC_ROPE, "max_position_embeddings"),
    ],
)
def test_rope_that_depends_on_the_length_of_the_call(family: str, rope: dict[str, Any], limit: str) -> None:
    positions = OFFSET + TAIL
    model = attached_model(family, rope_parameters=dict(rope), **{limit: positions})
    context = prefill(model, TOKENS, LAYOUT, tail_room=TAIL)
    assert_same(context.tail(TAILS[0]), packed(model, list(range(len(LENGTHS))), TAILS[0]))
    message = f"{rope['rope_type']} RoPE .* beyond {positions}, and the prompt has {positions + 1} positions"
    with pytest.raises(ValueError, match=message):
        prefill(model, TOKENS, LAYOUT, tail_room=TAIL + 1)


@pytest.mark.parametrize(
    "layout",
    [
        BlockLayout.from_lengths([(PREFIX, LENGTHS, 1)]),
        BlockLayout.from_lengths([(PREFIX, LENGTHS, 0)], pattern="causal"),
        BlockLayout.from_lengths([(PREFIX, LENGTHS[:2], 0), (0, LENGTHS[2:], 0)]),
        BlockLayout.from_lengths([(0, [], 0)]),
        BlockLayout.from_lengths([]),
    ],
)
def test_other_layouts_are_refused(layout: BlockLayout) -> None:
    with pytest.raises(ValueError, match="layout: expected one list of the block pattern with no tail"):
        prefill(attached_model("llama"), random_tokens(layout.num_tokens), layout, tail_room=TAIL)


def test_unfit_arguments() -> None:
    model = attached_model("llama")
    with pytest.raises(ValueError, match="model: expected an attached model"):
        prefill(make_model("llama"), TOKENS, LAYOUT, tail_room=TAIL)
    with pytest.raises(ValueError, match="tail_room: expected a positive integer, got 0"):
        prefill(model, TOKENS, LAYOUT, tail_room=0)
    with pytest.raises(ValueError, match=f"tail_offset: expected at least {OFFSET}"):
        prefill(model, TOKENS, LAYOUT, tail_room=TAIL, tail_offset=OFFSET - 1)
    with pytest.raises(ValueError, match="input_ids: expected shape"):
        prefill(model, TOKENS[1:], LAYOUT, tail_room=TAIL)
    context = prefill(model, TOKENS, LAYOUT, tail_room=TAIL)
    for tail in (TAILS[0, :0], random_tokens(TAIL + 1), TAILS):
        with pytest.raises(ValueError, match=rf"input_ids: expected \[t\] with t from 1 to {TAIL}, got"):
            context.tail(tail)
    context.remove(2)
    for document in (2, -1, len(LENGTHS)):
        with pytest.raises(ValueError, match=rf"document: expected one of \[0, 1, 3, 4, 5\], got {document}"):
            context.remove(document)
