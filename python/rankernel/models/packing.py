"""Prompts that begin alike as one packed row: what they share once, the rest of each as a block behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from rankernel.layout import BlockLayout

BATCH_TOKENS = 4096
"""Tokens that are packed in one row. On a CPU, rows several times as long cost up to twice as much a token: PyTorch's
intermediate results then are fresh memory each time, whose pages the system has to provide."""

Prompt = list[int]
"""Token ids of one prompt."""


class PackedPrompts(NamedTuple):
    """One packed row.

    Attributes:
        input_ids: int64 [T].
        layout: lists ``[shared beginning][rest of a prompt]...[rest of a prompt]`` without tails.
        position_ids: int64 [T], of every token in its own prompt.
        ends: int64 [N], packed position of the last token of every prompt, in the order of the prompts.
    """

    input_ids: torch.Tensor
    layout: BlockLayout
    position_ids: torch.Tensor
    ends: torch.Tensor


def shared_length(prompts: Sequence[Prompt], last: int = 1) -> int:
    """How many first tokens all prompts have in common, leaving at least ``last`` tokens of each."""
    if len(prompts) < 2:
        return 0
    # Whatever the first and the last in lexicographic order have in common, all between them have too.
    pairs = zip(min(prompts), max(prompts), strict=False)
    common = next((place for place, (a, b) in enumerate(pairs) if a != b), len(min(prompts)))
    return max(0, min(common, *(len(prompt) - last for prompt in prompts)))


def packed_tokens(groups: Sequence[Sequence[Prompt]]) -> int:
    """Tokens that prompts take where every group shares its beginning once."""
    return sum(
        sum(len(prompt) for prompt in group) - shared_length(group) * (len(group) - 1) for group in groups if group
    )


def pack_prompts(
    groups: Sequence[Sequence[Prompt]], *, batch_tokens: int = BATCH_TOKENS, window: int | None = None, last: int = 1
) -> Iterator[PackedPrompts]:
    """Packs prompts so that a causal model gives each the hidden states that it has alone, without padding.

    The tokens that all prompts of a group begin with are computed once: a block sees this prefix and itself, at the
    positions that the prompt has alone. A group that does not fit is split, and its prefix repeated.

    Args:
        groups: token ids of prompts; the prompts of a group are expected to share a beginning.
        batch_tokens: a row stays within so many tokens, unless a single prompt is longer.
        window: smallest sliding window of the model's layers. It is counted in packed tokens, so behind it a block
            would lose its prefix: prompts share a prefix only as far as all of them lie within the window.
        last: how many of a prompt's last tokens the caller reads; these are never part of a prefix.

    Yields:
        Rows in the order of the prompts.

    Raises:
        ValueError: ``batch_tokens`` is not positive, or a prompt has fewer than ``last`` tokens.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens: expected a positive integer, got {batch_tokens}")
    row: list[tuple[int, list[Prompt]]] = []
    row_tokens = list_tokens = 0
    for group in groups:
        for prompt in group:
            if len(prompt) < last:
                raise ValueError(f"groups: expected prompts of at least {last} tokens, got one of {len(prompt)}")
        shared = shared_length(group, last)
        joins = False  # whether the row ends with a list of this group that has room
        for prompt in group:
            own = len(prompt) - shared
            joins = joins and (window is None or list_tokens + own <= window)
            if row and row_tokens + own + (0 if joins else shared) > batch_tokens:
                yield _packed(row)
                row, row_tokens, joins = [], 0, False
            if not joins:
                row.append((shared, []))
                row_tokens += shared
                list_tokens = shared
            row[-1][1].append(prompt)
            row_tokens += own
            list_tokens += own
            joins = True
    if row:
        yield _packed(row)


def _packed(lists: Sequence[tuple[int, Sequence[Prompt]]]) -> PackedPrompts:
    tokens: list[int] = []
    ends: list[int] = []
    lengths = []
    for shared, prompts in lists:
        tokens += prompts[0][:shared]
        for prompt in prompts:
            tokens += prompt[shared:]
            ends.append(len(tokens) - 1)
        lengths.append((shared, [len(prompt) - shared for prompt in prompts], 0))
    layout = BlockLayout.from_lengths(lengths)
    position_ids = layout.position_ids("shared", tail_offset=max(1, len(tokens)))
    return PackedPrompts(torch.tensor(tokens), layout, position_ids, torch.tensor(ends))
