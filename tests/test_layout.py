"""BlockLayout: boundaries, positions, masks, errors."""

from __future__ import annotations

import pytest
import torch

from rankernel import BlockLayout
from rankernel.layout import DOCUMENT, PREFIX, TAIL


def test_boundaries() -> None:
    layout = BlockLayout.from_lengths([(2, [3, 0, 1], 2), (0, [], 0), (1, [4], 0)])
    assert layout.cu_seqlens.tolist() == [0, 2, 5, 5, 6, 8, 8, 8, 9, 13, 13]
    assert layout.roles.tolist() == [0, 1, 1, 1, 2, 0, 2, 0, 1, 2]
    assert layout.list_offsets.tolist() == [0, 5, 7, 10]
    assert layout.document_offsets.tolist() == [0, 3, 3, 4]
    assert (layout.num_tokens, layout.num_lists, layout.num_documents, layout.max_documents) == (13, 3, 4, 3)
    assert layout.segments()[0] == [(0, 2, PREFIX), (2, 5, DOCUMENT), (5, 5, DOCUMENT), (5, 6, DOCUMENT), (6, 8, TAIL)]
    for tensor in (layout.cu_seqlens, layout.roles, layout.list_offsets, layout.document_offsets):
        assert tensor.dtype == torch.int32


def test_positions() -> None:
    layout = BlockLayout.from_lengths([(2, [3, 1], 2), (1, [2], 1)])
    assert layout.position_ids(tail_offset=100).tolist() == [0, 1, 2, 3, 4, 2, 100, 101, 0, 1, 2, 100]
    assert layout.position_ids("sequential").tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert layout.tail_positions().tolist() == [7, 11]
    with pytest.raises(ValueError, match="tail_offset: expected at least 5"):
        layout.position_ids(tail_offset=4)
    with pytest.raises(ValueError, match="scheme"):
        layout.position_ids("other")
    with pytest.raises(ValueError, match="last: expected at most the tail length, 1 in list 1"):
        layout.tail_positions(last=2)


def test_masks() -> None:
    layout = BlockLayout.from_lengths([(1, [2, 1], 2), (0, [1], 0)])
    expected = """
        1 . . . . . .
        1 1 . . . . .
        1 1 1 . . . .
        1 . . 1 . . .
        1 1 1 1 1 . .
        1 1 1 1 1 1 .
        . . . . . . 1"""
    rows = [[cell == "1" for cell in line.split()] for line in expected.split("\n")[1:]]
    assert layout.dense_mask().tolist() == rows
    window = layout.dense_mask(window=2)
    assert window[3].tolist() == [False, False, False, True, False, False, False]
    assert window[5].tolist() == [False, False, False, False, True, True, False]
    causal = BlockLayout.from_lengths([(1, [2, 1], 2)], "causal")
    assert torch.equal(causal.dense_mask(), torch.ones(6, 6).tril().bool())


def test_to_remembers_devices() -> None:
    layout = BlockLayout.from_lengths([(1, [2], 1)])
    assert layout.to("cpu") is layout
    meta = layout.to("meta")
    assert meta.cu_seqlens.device.type == "meta"
    assert layout.to("meta") is meta
    assert meta.to("cpu") is layout


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([(1, [2])], ValueError, r"lengths\[0\]: expected \(prefix_len"),
        ([(1, 2, 3)], ValueError, r"lengths\[0\]"),
        ([(1, [2], 3), (1, [-2], 3)], ValueError, r"lengths\[1\]: expected lengths of at least 0, got -2"),
        ([(1, [2.0], 3)], TypeError, "expected integers, got 2.0 of type float"),
        ([(True, [2], 3)], TypeError, "expected integers"),
        ([(2**30, [2**30], 0)], ValueError, "fewer than 2\\*\\*31"),
    ],
)
def test_bad_lengths(lengths: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BlockLayout.from_lengths(lengths)


def test_bad_pattern() -> None:
    with pytest.raises(ValueError, match="pattern: expected one of"):
        BlockLayout.from_lengths([], "dense")
