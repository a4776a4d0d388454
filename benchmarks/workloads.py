"""Shapes that several case modules share, what is useful work on them, and the rate of ``torch.matmul``."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from measure import Call, Implementation
from rankernel import BlockLayout

MATMUL_SIZES = {"cpu": 2048, "cuda": 8192}


def ranking_list(
    documents: int, shortest: int = 40, longest: int = 160, prefix: int = 64, tail: int = 48
) -> tuple[int, list[int], int]:
    """Lengths of one list for ``BlockLayout.from_lengths``: documents of ``shortest`` to ``longest`` tokens, uniform.

    The same arguments give the same lengths; more documents extend the lengths of fewer.
    """
    generator = random.Random(0)
    return prefix, [generator.randint(shortest, longest) for _ in range(documents)], tail


def in_words(layout: BlockLayout, query_heads: int, kv_heads: int, head_size: int) -> str:
    """The shape as the tables and ``--list`` show it."""
    documents = [length for _, lengths, _ in layout.lengths for length in lengths]
    lists = f"{layout.num_lists} list{'s' if layout.num_lists > 1 else ''}"
    shortest, longest = min(documents), max(documents)
    tokens = f"{shortest}" if shortest == longest else f"{shortest}-{longest}"
    prefix, _, tail = layout.lengths[0]
    return (
        f"{lists}, {len(documents)} document{'s' if len(documents) > 1 else ''} of {tokens} tokens, prefix {prefix}, "
        f"tail {tail}, {layout.num_tokens} tokens, {query_heads}/{kv_heads} heads of {head_size}"
    )


def padded_index(
    segments: Sequence[tuple[int, int, int]], device: torch.device | str, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of segments (begin, end, role) padded to the longest, rounded up: index and valid, [segments, width]."""
    begins = torch.tensor([begin for begin, _, _ in segments], device=device)
    lengths = torch.tensor([end - begin for begin, end, _ in segments], device=device)
    width = -(-int(lengths.max()) // multiple) * multiple
    offset = torch.arange(width, device=device)
    valid = offset < lengths[:, None]
    return torch.where(valid, begins[:, None] + offset, segments[0][0]), valid


def causal_pairs(rows: int, before: int = 0) -> int:
    """Visible (row, key) pairs of ``rows`` tokens that see themselves causally and ``before`` tokens in full."""
    return rows * before + rows * (rows + 1) // 2


def visible_pairs(layout: BlockLayout) -> int:
    """Visible (row, key) pairs of the block pattern."""
    pairs = 0
    for prefix, documents, tail in layout.lengths:
        pairs += causal_pairs(prefix) + sum(causal_pairs(length, prefix) for length in documents)
        pairs += causal_pairs(tail, prefix + sum(documents))
    return pairs


def attention_flops(pairs: int, query_heads: int, head_size: int) -> int:
    """Useful floating-point operations of attention: two multiply-adds per pair, head and dimension."""
    return 4 * head_size * query_heads * pairs


def matmul(dtype: torch.dtype, device: str = "cpu") -> Implementation:
    """``torch.matmul`` of two square matrices that fill the device: the rate that attention rates are held against."""
    size = MATMUL_SIZES[device]

    def build() -> Call:
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
        return lambda: left @ right

    return Implementation(f"torch.matmul {size}^3", build, work=2 * size**3, yardstick=True)
