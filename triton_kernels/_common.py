# ruff: noqa: N803  compile-time arguments are in capitals, as is usual with Triton
"""What the modules of kernels share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl


class CompileCase(NamedTuple):
    """One specialisation that tests/test_triton.py compiles ahead of time; every module lists its own.

    Attributes:
        kernel: function under ``triton.jit``.
        signature: type of every argument, ``"constexpr"`` for those in ``constants``.
        constants: value of every compile-time argument; None for a pointer that is left out.
        num_warps, num_stages: as launched.
        aligned: arguments that are launched with multiples of 16.
        same_threads: ``num_warps`` is that of a warp of 32, and others get as many threads.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    same_threads: bool = False


@triton.jit
def bounds(offsets, number, num_items):
    """Begin and end of a list: inside the items, whatever the offsets hold."""
    begin = tl.minimum(tl.maximum(tl.load(offsets + number), 0), num_items)
    end = tl.minimum(tl.maximum(tl.load(offsets + number + 1), begin), num_items)
    return begin, end


@triton.jit
def list_of(list_offsets, segment, num_lists):
    """Number of the list that has a segment."""
    low, high = segment * 0, num_lists - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(list_offsets + middle) <= segment:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def tile_of(offsets, num_items, num_lists, ROWS: tl.constexpr):
    """Number, begin and end of this program's list, and its first row there, which may lie outside the list.

    List l gets the programs from offsets[l] // ROWS + l on. These are as many as it needs or one more, for
    floor(b) - floor(a) + 1 >= ceil(b - a), and num_items // ROWS + num_lists in all.
    """
    program = tl.program_id(0)
    low, high = program * 0, num_lists - 1
    while low < high:
        middle = (low + high + 1) // 2
        begin, _ = bounds(offsets, middle, num_items)
        if begin // ROWS + middle <= program:
            low = middle
        else:
            high = middle - 1
    begin, end = bounds(offsets, low, num_items)
    return low, begin, end, begin + (program - low - begin // ROWS) * ROWS


@triton.jit
def tanh(x):
    """As in csrc/cpu/simd/math.h, about 2 ulp: a polynomial where 1 - 2 / (exp(2x) + 1) would cancel."""
    size, square = tl.abs(x), x * x
    p = -5.659988945e-03 * square + 2.059098862e-02
    p = p * square - 5.372106828e-02
    p = p * square + 1.333112754e-01
    p = p * square - 3.333326053e-01
    p = p * square + 1
    large = 1 - 2 / (tl.exp(2 * size) + 1)
    return tl.where(size < 0.625, x * p, tl.where(x < 0, -large, large))
