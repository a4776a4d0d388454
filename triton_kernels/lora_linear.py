# ruff: noqa: N803  compile-time arguments are in capitals, as is usual with Triton
"""Low-rank adapters around a base product; python/rankernel/reference/lora_linear.py says what the functions do.

Factors that stand side by side are packed under one another and so share a pass over x: [ranks, size] is little beside
[rows, size]. With segments a tile of rows lies in one segment, and a table has the place of each adapter's factor.
Where rows are few the sums are split over columns, and gradients always over rows; the parts are added in a fixed
order: no atomics, and the same bits on every call. Sums and gradients of up to FUSED_RANKS ranks come out of one pass
over x; of more, the parts of the sums would soon be more memory than x, and there are two.

Products run on the matrix units. Float32 factors keep their accuracy: beside bfloat16 x the small operand, factors or
coefficients, is split in registers into three bfloat16 parts, which hold all of its 24 bits, while x goes in as it
lies in memory. Beside float32 and float16 x both operands are split, by the compiler (bf16x6; tf32 would lose bits,
and "ieee" has no matrix units on NVIDIA). An update of 16-bit results needs no more than two parts (bf16x3): 2^-16 of
the update is far below the rounding of the result. Coefficients beside 16-bit factors are rounded as eager does.

A Philox counter of dropout gives the bits of 8 columns; reshaping brings them to their columns. The factor of what is
kept goes into the scale, so that x is not rounded again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from rankernel.reference.lora_linear import Dropout, Segments, drop_threshold

from ._common import CompileCase, bounds, tile_of

FUSED_RANKS = 16
PROGRAMS, WIDE_PROGRAMS = 512, 256  # that keep the largest GPUs busy
WARPS = 8
TOTALS = 512  # that a program adds up
ENTRIES = 48  # of the table that a launch writes
PRECISION, UPDATE_PRECISION = "bf16x6", "bf16x3"  # of products of float32; of those added to 16-bit results


@triton.jit
def _keep(seed, threshold, rows, first, BLOCK: tl.constexpr):
    """Whether dropout keeps an element, [rows, BLOCK], of the columns from first on, a multiple of BLOCK."""
    lanes: tl.constexpr = max(BLOCK // 8, 16)
    num_words: tl.constexpr = BLOCK // lanes // 2
    counter = (first // 128 * 16 + tl.arange(0, lanes))[None, :]
    row = rows.to(tl.int64)[:, None]
    zero = row.to(tl.int32) * 0 + counter * 0
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), counter + zero, low + zero, high + zero, zero)
    if num_words == 2:
        late = first % 128 >= 64
        words = tl.join(tl.where(late, w2, w0), tl.where(late, w3, w1))
    else:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join((words & 0xFFFF).to(tl.int32), (words >> 16).to(tl.int32))
    # [rows, blocks of 128, lanes, bits of words and halves] to columns
    keep = (halves >= threshold).to(tl.int8).reshape(rows.shape[0], lanes // 16, 16, 2 * num_words)
    return keep.permute(0, 1, 3, 2).reshape(rows.shape[0], BLOCK) != 0


@triton.jit
def _load_x(x, seed, begin, rows, first, size, x_stride, threshold, BLOCK: tl.constexpr):
    """Tiles are addressed as a 64-bit scalar and 32-bit offsets in the tile, which take half the registers."""
    columns = tl.arange(0, BLOCK)[None, :]
    tile = tl.load(
        x + (begin * x_stride + first) + (rows[:, None] * x_stride + columns), mask=columns < size - first, other=0
    )
    if threshold is not None:
        tile = tl.where(_keep(seed, threshold, begin + rows, first, BLOCK), tile, 0)
    return tile


@triton.jit
def _add_product(sums, x, small, PRECISION: tl.constexpr):
    """sums + x small, for small of the type of x or float32."""
    if x.dtype == tl.bfloat16 and small.dtype == tl.float32:
        for _ in tl.static_range(3):
            part = small.to(tl.bfloat16)
            sums = tl.dot(x, part, sums)
            small -= part.to(tl.float32)
    else:
        sums = tl.dot(x.to(small.dtype), small, sums, input_precision=PRECISION)
    return sums


@triton.jit
def _factor(table, number, num_factors):
    """First row, rank and scale of a factor; rank 0 where there is none of that number."""
    inside = (number >= 0) & (number < num_factors)
    entry = table + tl.where(inside, number, 0) * 3
    rank = tl.where(inside, tl.load(entry + 1), 0)
    return tl.load(entry).to(tl.int64), rank.to(tl.int32), tl.load(entry + 2)


@triton.jit
def _tile_of_rows(
    offsets, adapters, table, num_rows, num_segments, num_factors, num_ranks, scale, ROWS: tl.constexpr
):  # fmt: skip
    """This program's first row, its rows from there on, which exist, and first row, rank and scale of their factor.

    Rows that do not exist repeat one that does, for a mask that varied from row to row would make loads shorter.
    """
    if offsets is None:
        begin, end = tl.program_id(0).to(tl.int64) * ROWS, num_rows
        first, rank = begin * 0, num_ranks
    else:
        segment, _, end, begin = tile_of(offsets, num_rows, num_segments, ROWS)
        first, rank, scale = _factor(table, tl.load(adapters + segment), num_factors)
    left = tl.minimum(end - begin, ROWS).to(tl.int32)
    rows = tl.arange(0, ROWS)
    return tl.where(left > 0, begin, 0), tl.maximum(tl.minimum(rows, left - 1), 0), rows < left, first, rank, scale


@triton.jit
def _table_kernel(table, begin, numbers, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(table + begin + i, numbers[i])


@triton.jit(do_not_specialize=["num_rows", "num_segments", "num_factors", "part_stride", "threshold"])
def _sums_kernel(
    x, factors, offsets, adapters, table, seed, sums, num_rows, size, num_ranks, num_segments, num_factors, x_stride,
    rank_stride, size_stride, sums_stride, part_stride, scale, threshold,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of scale x factors^T, or the part of it that every so many columns make."""
    begin, rows, exist, first_rank, rank, scale = _tile_of_rows(
        offsets, adapters, table, num_rows, num_segments, num_factors, num_ranks, scale, ROWS
    )
    first_of_block, part = tl.program_id(1) * RANKS, tl.program_id(2)
    ranks = first_of_block + tl.arange(0, RANKS)
    products = tl.zeros([ROWS, RANKS], tl.float32)
    f = factors + (first_rank + first_of_block) * rank_stride + part.to(tl.int64) * BLOCK * size_stride
    f_step = tl.num_programs(2).to(tl.int64) * BLOCK * size_stride
    columns = tl.arange(0, BLOCK)[:, None]
    own_ranks = tl.minimum(tl.arange(0, RANKS), rank - 1 - first_of_block)[None, :]
    f_offsets = own_ranks * rank_stride + columns * size_stride
    for first in range(part * BLOCK, tl.where(first_of_block < rank, size, 0), tl.num_programs(2) * BLOCK):
        small = tl.load(f + f_offsets, mask=columns < size - first, other=0)
        tile = _load_x(x, seed, begin, rows, first, size, x_stride, threshold, BLOCK)
        products = _add_product(products, tile, small, PRECISION)
        f += f_step
    out = sums + (part.to(tl.int64) * part_stride + begin * sums_stride)
    out += rows[:, None] * sums_stride + ranks[None, :]
    products = tl.where((ranks < rank)[None, :], products * scale, 0)
    tl.store(out, products, mask=exist[:, None] & (ranks < num_ranks)[None, :])


@triton.jit
def _add_rows(
    products, begin, end, x, coefficients, small, seed, sums, ranks, rank, first, size, num_ranks, x_stride,
    coefficients_stride, step, threshold,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds x^T coefficients, [BLOCK, ranks], of every step-th tile of rows; their parts of the sums on the way."""
    for row in range(begin, end, step):
        # As in _tile_of_rows; the last row's own NaN would be in the product anyway.
        rows = tl.arange(0, ROWS)
        left = tl.minimum(end - row, ROWS).to(tl.int32)
        own, own_ranks = tl.minimum(rows, left - 1), tl.minimum(ranks, rank - 1)
        c = coefficients + row * coefficients_stride + (own[:, None] * coefficients_stride + own_ranks[None, :])
        c = tl.load(c, mask=(rows < left)[:, None], other=0)
        tile = _load_x(x, seed, row, own, first, size, x_stride, threshold, BLOCK)
        if not EXACT:
            c = c.to(tile.dtype)
        products = _add_product(products, tl.trans(tile), c, PRECISION)
        if sums is not None:
            part = _add_product(tl.zeros([ROWS, ranks.shape[0]], tl.float32), tile, small, PRECISION)
            inside = (rows < left)[:, None] & (ranks < rank)[None, :]
            tl.store(sums + row * num_ranks + (rows[:, None] * num_ranks + ranks[None, :]), part, mask=inside)
    return products


@triton.jit(do_not_specialize=["num_rows", "num_segments", "num_factors", "num_blocks", "threshold"])
def _gradient_kernel(
    x, coefficients, factors, offsets, adapters, table, seed, parts, sums, num_rows, size, num_ranks, num_segments,
    num_factors, num_blocks, x_stride, coefficients_stride, rank_stride, size_stride, threshold,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """coefficients^T x, [parts, ranks, size], and, where wanted, x factors^T, [blocks of columns, rows, ranks].

    Of every factor's tiles of rows, a part takes every so many.
    """
    block, part, num_parts = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    number = tl.program_id(1) // num_blocks
    first_of_block = tl.program_id(1) % num_blocks * RANKS
    ranks = first_of_block + tl.arange(0, RANKS)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    products = tl.zeros([BLOCK, RANKS], tl.float32)
    small = None
    if offsets is None:
        first_rank, rank = part.to(tl.int64) * 0, num_ranks
        if sums is not None:
            f = factors + ranks[None, :] * rank_stride + columns.to(tl.int64)[:, None] * size_stride
            small = tl.load(f, mask=(columns < size)[:, None] & (ranks < rank)[None, :], other=0)
            sums += block.to(tl.int64) * num_rows * num_ranks
        products = _add_rows(
            products, part.to(tl.int64) * ROWS, num_rows, x, coefficients, small, seed, sums, ranks, rank,
            block * BLOCK, size, num_ranks, x_stride, coefficients_stride, num_parts * ROWS, threshold,
            ROWS, BLOCK, EXACT, PRECISION,
        )  # fmt: skip
    else:
        first_rank, rank, _ = _factor(table, number, num_factors)
        before = part * 0  # tiles of the segments so far
        for segment in range(tl.where(first_of_block < rank, num_segments, 0)):
            begin, end = bounds(offsets, segment, num_rows)
            end = tl.where(tl.load(adapters + segment) == number, end, begin)
            tile = (part + num_parts - before % num_parts) % num_parts
            products = _add_rows(
                products, begin + tile * ROWS, end, x, coefficients, small, seed, sums, ranks, rank, block * BLOCK,
                size, num_ranks, x_stride, coefficients_stride, num_parts * ROWS, threshold, ROWS, BLOCK, EXACT,
                PRECISION,
            )  # fmt: skip
            before += tl.cdiv(end - begin, ROWS).to(tl.int32)
    place = (part.to(tl.int64) * num_ranks + first_rank + ranks)[None, :] * size + columns[:, None]
    tl.store(parts + place, products, mask=(columns < size)[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize=["num_parts", "num_rows", "part_stride"])
def _total_kernel(
    parts, out, num_parts, num_rows, size, part_stride, row_stride, size_stride, scale, BLOCK: tl.constexpr
):  # fmt: skip
    """scale times the sum of the parts, each [rows, size] and contiguous."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = place // size, place % size
    total = tl.zeros([BLOCK], tl.float32)
    parts += place
    for _ in range(num_parts):
        total += tl.load(parts, mask=row < num_rows, other=0)
        parts += part_stride
    tl.store(out + row * row_stride + column * size_stride, total * scale, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_segments", "num_factors", "threshold"])
def _expand_kernel(
    out, coefficients, factors, offsets, adapters, table, seed, num_rows, size, num_ranks, num_segments, num_factors,
    out_stride, coefficients_stride, rank_stride, size_stride, scale, threshold,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out += scale coefficients factors, a tile."""
    begin, rows, exist, first_rank, rank, scale = _tile_of_rows(
        offsets, adapters, table, num_rows, num_segments, num_factors, num_ranks, scale, ROWS
    )
    first_column = tl.program_id(1) * BLOCK
    columns = tl.arange(0, BLOCK)[None, :]
    within = columns < tl.where(rank > 0, size - first_column, 0)
    update = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, rank, RANKS):
        ranks = tl.arange(0, RANKS)
        inside = ranks < rank - first
        c = coefficients + (begin * coefficients_stride + first)
        c += rows[:, None] * coefficients_stride + ranks[None, :]
        c = tl.load(c, mask=inside[None, :], other=0)
        f = factors + (first_rank + first) * rank_stride + first_column.to(tl.int64) * size_stride
        f += ranks[:, None] * rank_stride + columns * size_stride
        f = tl.load(f, mask=inside[:, None] & within, other=0)
        update = tl.dot(c.to(f.dtype), f, update, input_precision=PRECISION)
    if threshold is not None:
        update = tl.where(_keep(seed, threshold, begin + rows, first_column, BLOCK), update, 0)
    place = out + (begin * out_stride + first_column) + (rows[:, None] * out_stride + columns)
    inside = exist[:, None] & within
    tl.store(place, tl.load(place, mask=inside, other=0) + update * scale, mask=inside)


class _Call:
    """What both functions make of their arguments; without segments the factors are _side_by_side."""

    def __init__(
        self,
        rows: torch.Tensor,
        factors: Sequence[torch.Tensor],
        scales: Sequence[float],
        segments: Segments | None,
        dropout: Dropout | None,
    ) -> None:
        threshold = 0 if dropout is None else drop_threshold(dropout.probability)
        (self.num_rows, self.size), self.dtype = rows.shape, rows.dtype
        self.factors, self.segments = factors, segments or (None, None)
        self.ranks = [len(factor) for factor in factors]
        self.firsts = list(itertools.accumulate(self.ranks, initial=0))
        self.scales = [scale * 65536 / (65536 - threshold) for scale in scales]
        self.seed, self.threshold = (dropout.seed, threshold) if dropout is not None and threshold else (None, None)
        self.num_ranks = self.firsts[-1] if segments is None else max(self.ranks, default=0)  # of a row, at most
        self.num_segments = 0 if segments is None else segments.adapters.shape[0]
        self.empty = not (rows.numel() and self.num_ranks and (segments is None or self.num_segments))
        self.table, self.scale = None, 1.0
        if not self.empty and segments is None:
            self.scale = self.scales[0]
        elif not self.empty:
            self.table = _table(self.firsts, self.ranks, self.scales, rows)

    def packed(self) -> torch.Tensor:
        return self.factors[0] if len(self.factors) == 1 else torch.cat(list(self.factors))

    def sizes(self, num_ranks: int) -> dict[str, int]:
        rows = triton.cdiv(self.num_rows, max(self.num_segments, 1))
        return _sizes(rows, num_ranks, self.dtype, self.factors[0].dtype)

    def tiles(self, rows: int) -> int:
        return triton.cdiv(self.num_rows, rows) if self.table is None else self.num_rows // rows + self.num_segments


def _side_by_side(factors: Sequence[torch.Tensor], scales: Sequence[float], columns: Sequence[int]) -> bool:
    """Whether the columns of the factors follow each other and the scale is one."""
    ends = [column + len(factor) for column, factor in zip(columns, factors, strict=True)]
    return list(columns[1:]) == ends[:-1] and len(set(scales)) < 2


def _put_side_by_side(
    coefficients: torch.Tensor, factors: Sequence[torch.Tensor], scales: Sequence[float], columns: Sequence[int]
) -> torch.Tensor:
    """Coefficients that hold the scales, in the order of the packed factors."""
    each = zip(factors, scales, columns, strict=True)
    return torch.cat([scale * coefficients[:, column : column + len(factor)] for factor, scale, column in each], dim=1)


def _table(firsts: Sequence[int], ranks: Sequence[int], scales: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """[factors, 3]: first row, rank and scale. As arguments of a kernel the numbers reach the device without a copy
    that waits, or that a CUDA graph cannot capture."""
    numbers = [float(number) for entry in zip(firsts, ranks, scales, strict=False) for number in entry]
    numbers += [0.0] * (-len(numbers) % ENTRIES)
    table = like.new_empty(len(numbers), dtype=torch.float32)
    with torch.cuda.device_of(like):
        for begin in range(0, len(numbers), ENTRIES):
            part = tuple(numbers[begin : begin + ENTRIES])
            _table_kernel[(1,)](table, begin, part, COUNT=ENTRIES, num_warps=1, enable_fp_fusion=True)
    return table


def _split_by_compiler(dtype: torch.dtype, factor_dtype: torch.dtype) -> bool:
    return factor_dtype == torch.float32 and dtype != torch.bfloat16


def _sizes(rows: int, num_ranks: int, dtype: torch.dtype, factor_dtype: torch.dtype) -> dict[str, int]:
    """Of the tiles of sums and updates, as large as registers allow, and few, so that all batches share them."""
    most_rows, most_ranks, block = (64, 64, 128) if factor_dtype != torch.float32 else (64, 32, 64)
    if _split_by_compiler(dtype, factor_dtype):
        most_rows, most_ranks = 32, 16
    rows, ranks = (max(triton.next_power_of_2(number), 16) for number in (rows, num_ranks))
    return {"ROWS": min(rows, most_rows), "RANKS": min(ranks, most_ranks), "BLOCK": block}


def _gradient_sizes(num_ranks: int, dtype: torch.dtype, factor_dtype: torch.dtype, fused: bool) -> dict[str, int]:
    if fused:  # The wider the block, the fewer parts of the sums.
        return {"ROWS": 16, "RANKS": FUSED_RANKS, "BLOCK": 256}
    return _sizes(32, num_ranks, dtype, factor_dtype) | {"ROWS": 32, "BLOCK": 128}


def _total(parts: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    """out = scale times the sum of parts, [parts, *out.shape], contiguous but for the first dimension."""
    if out.numel():
        _total_kernel[(triton.cdiv(out.numel(), TOTALS),)](
            parts, out, len(parts), *out.shape, parts.stride(0), *out.stride(), scale,
            BLOCK=TOTALS, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def _sums(call: _Call, x: torch.Tensor, sums: torch.Tensor) -> None:
    num_ranks = sums.shape[1]
    factors, sizes = call.packed(), call.sizes(num_ranks)
    tiles, blocks = call.tiles(sizes["ROWS"]), triton.cdiv(num_ranks, sizes["RANKS"])
    num_parts = max(min(PROGRAMS // (tiles * blocks), triton.cdiv(call.size, sizes["BLOCK"])), 1)
    parts = sums[None] if num_parts == 1 else sums.new_empty((num_parts, *sums.shape))
    _sums_kernel[(tiles, blocks, num_parts)](
        x, factors, *call.segments, call.table, call.seed, parts, call.num_rows, call.size, num_ranks,
        call.num_segments, len(call.factors), x.stride(0), *factors.stride(), parts.stride(1), parts.stride(0),
        call.scale, call.threshold, PRECISION=PRECISION, num_warps=WARPS, enable_fp_fusion=True, **sizes,
    )  # fmt: skip
    if num_parts > 1:
        _total(parts, sums, 1.0)


def _gradients(
    call: _Call, x: torch.Tensor, coefficients: torch.Tensor, gradients: Sequence[torch.Tensor | None],
    sums: torch.Tensor | None,
) -> None:  # fmt: skip
    """Gradients, and in the same pass over x the sums."""
    factor_dtype, num_ranks = call.factors[0].dtype, call.firsts[-1]
    sizes = _gradient_sizes(call.num_ranks, call.dtype, factor_dtype, sums is not None)
    blocks, column_blocks = triton.cdiv(call.num_ranks, sizes["RANKS"]), triton.cdiv(call.size, sizes["BLOCK"])
    groups = blocks if call.table is None else blocks * len(call.factors)
    num_parts = max(min(WIDE_PROGRAMS // (column_blocks * groups), call.tiles(sizes["ROWS"])), 1)
    parts = coefficients.new_empty((num_parts, num_ranks, call.size))
    factors, strides, sums_parts = None, (0, 0), None
    if sums is not None:
        factors = call.packed()
        strides = factors.stride()
        sums_parts = sums.new_empty((column_blocks, *sums.shape))
    _gradient_kernel[(column_blocks, groups, num_parts)](
        x, coefficients, factors, *call.segments, call.table, call.seed, parts, sums_parts, call.num_rows, call.size,
        num_ranks, call.num_segments, len(call.factors), blocks, x.stride(0), coefficients.stride(0), *strides,
        call.threshold, EXACT=factor_dtype == torch.float32, PRECISION=PRECISION, num_warps=WARPS,
        enable_fp_fusion=True, **sizes,
    )  # fmt: skip
    if sums is not None and sums_parts is not None:
        _total(sums_parts, sums, call.scale)
    for gradient, part, scale in zip(gradients, parts.split(call.ranks, dim=1), call.scales, strict=True):
        if gradient is not None:
            _total(part, gradient, scale)


def lora_shrink(
    x: torch.Tensor,
    factors: Sequence[torch.Tensor],
    scales: Sequence[float],
    columns: Sequence[int],
    segments: Segments | None = None,
    dropout: Dropout | None = None,
    *,
    sums: torch.Tensor | None = None,
    coefficients: torch.Tensor | None = None,
    gradients: Sequence[torch.Tensor | None] = (),
) -> None:
    """See :func:`rankernel.reference.lora_linear.lora_shrink`. Never waits for the device.

    Work memory is the factors once more where there are several, and parts of sums and gradients, together less than x
    where ranks are few. Offsets that fall or leave the rows, and adapters that do not exist, give an unspecified
    result, but nothing outside the tensors is read or written.
    """
    if segments is None and not _side_by_side(factors, scales, columns):
        # One pass over x without scales, which the coefficients hold already.
        ranks = [len(factor) for factor in factors]
        side_by_side = None if sums is None else sums.new_empty((len(x), sum(ranks)))
        if coefficients is not None:
            coefficients = _put_side_by_side(coefficients, factors, scales, columns)
        lora_shrink(
            x, factors, [1.0] * len(ranks), list(itertools.accumulate(ranks[:-1], initial=0)), None, dropout,
            sums=side_by_side, coefficients=coefficients, gradients=gradients,
        )  # fmt: skip
        if sums is not None and side_by_side is not None:
            sums.zero_()
            for part, scale, column in zip(side_by_side.split(ranks, dim=1), scales, columns, strict=True):
                torch.mul(part, scale, out=sums[:, column : column + part.shape[1]])
        return
    call = _Call(x, factors, scales, segments, dropout)
    learns = coefficients is not None and any(gradient is not None for gradient in gradients)
    if call.empty:
        for tensor in (sums, *(gradients if learns else ())):
            if tensor is not None:
                tensor.zero_()
        return
    if segments is None:
        own = slice(columns[0], columns[0] + call.num_ranks)
        if sums is not None:
            if call.num_ranks < sums.shape[1]:
                sums.zero_()
            sums = sums[:, own]
        coefficients = None if coefficients is None else coefficients[:, own]
    fused = learns and segments is None and call.num_ranks <= FUSED_RANKS
    fused &= not _split_by_compiler(call.dtype, factors[0].dtype)
    with torch.cuda.device_of(x):
        if coefficients is not None and learns:
            _gradients(call, x, coefficients, gradients, sums if fused else None)
        if sums is not None and not fused:
            _sums(call, x, sums)


def lora_expand(
    out: torch.Tensor,
    coefficients: torch.Tensor,
    factors: Sequence[torch.Tensor],
    scales: Sequence[float],
    columns: Sequence[int],
    segments: Segments | None = None,
    dropout: Dropout | None = None,
) -> None:
    """See :func:`rankernel.reference.lora_linear.lora_expand`, and :func:`lora_shrink`."""
    if segments is None and not _side_by_side(factors, scales, columns):
        coefficients = _put_side_by_side(coefficients, factors, scales, columns)
        scales, columns = [1.0] * len(factors), [0]
    call = _Call(out, factors, scales, segments, dropout)
    if call.empty:
        return
    if segments is None:
        coefficients = coefficients[:, columns[0] :]
    packed, sizes = call.packed(), call.sizes(call.num_ranks)
    precision = PRECISION if out.dtype == torch.float32 else UPDATE_PRECISION
    with torch.cuda.device_of(out):
        _expand_kernel[(call.tiles(sizes["ROWS"]), triton.cdiv(call.size, sizes["BLOCK"]))](
            out, coefficients, packed, *call.segments, call.table, call.seed, call.num_rows, call.size, call.num_ranks,
            call.num_segments, len(factors), out.stride(0), coefficients.stride(0), *packed.stride(), call.scale,
            call.threshold, PRECISION=precision, num_warps=WARPS, enable_fp_fusion=True, **sizes,
        )  # fmt: skip


_TYPES = {
    "offsets": "*i64", "adapters": "*i64", "table": "*fp32", "seed": "*i64", "coefficients": "*fp32", "sums": "*fp32",
    "parts": "*fp32", "numbers": ("fp32",) * ENTRIES, "scale": "fp32",
}  # fmt: skip
_NO_SEGMENTS = dict.fromkeys(("offsets", "adapters", "table"))
_NO_DROPOUT = dict.fromkeys(("seed", "threshold"))
_NO_SUMS = dict.fromkeys(("factors", "sums"))
_PLAIN = _NO_SEGMENTS | _NO_DROPOUT


def _case(
    kernel: Any, constants: dict[str, object], dtype: torch.dtype = torch.float32,
    factor_dtype: torch.dtype = torch.float32,
) -> CompileCase:  # fmt: skip
    """Strides as of A: one along the ranks, 1 along the size."""
    names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    types = _TYPES | {"x": names[dtype], "out": names[dtype], "factors": names[factor_dtype]}
    constants = {name: value for name, value in ({"size_stride": 1} | constants).items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    return CompileCase(kernel, signature, constants, WARPS)


def _tile_case(
    kernel: Any, dtype: torch.dtype, factor_dtype: torch.dtype, num_ranks: int, without: dict[str, Any]
) -> CompileCase:
    sizes: dict[str, Any] = {"PRECISION": PRECISION} | _sizes(64, num_ranks, dtype, factor_dtype)
    if kernel is _gradient_kernel:
        sizes |= {"EXACT": factor_dtype == torch.float32}
        sizes |= _gradient_sizes(num_ranks, dtype, factor_dtype, fused="sums" not in without)
    elif kernel is _expand_kernel and dtype != torch.float32:
        sizes |= {"PRECISION": UPDATE_PRECISION}
    return _case(kernel, sizes | without, dtype, factor_dtype)


_FLOAT, _BRAIN, _HALF = torch.float32, torch.bfloat16, torch.float16

# Not segments and dropout at once: that takes a few scalar registers too many of gfx942, which its vector registers
# hold.
COMPILE_CASES = (
    _case(_table_kernel, {"COUNT": ENTRIES}),
    _case(_total_kernel, {"BLOCK": TOTALS}, _BRAIN),
    _tile_case(_sums_kernel, _FLOAT, _FLOAT, 64, _NO_DROPOUT),
    _tile_case(_sums_kernel, _BRAIN, _BRAIN, 64, _NO_DROPOUT),
    _tile_case(_sums_kernel, _BRAIN, _BRAIN, 16, _NO_SEGMENTS),
    _tile_case(_sums_kernel, _BRAIN, _FLOAT, 64, _NO_DROPOUT),
    _tile_case(_sums_kernel, _BRAIN, _FLOAT, 16, _NO_SEGMENTS | {"ROWS": 16}),
    _tile_case(_sums_kernel, _HALF, _FLOAT, 64, _NO_SEGMENTS),
    _tile_case(_gradient_kernel, _HALF, _HALF, 16, _PLAIN),
    _tile_case(_gradient_kernel, _FLOAT, _FLOAT, 64, _NO_SUMS | _NO_DROPOUT),
    _tile_case(_gradient_kernel, _BRAIN, _BRAIN, 16, _PLAIN),
    _tile_case(_gradient_kernel, _BRAIN, _BRAIN, 64, _NO_SUMS | _NO_DROPOUT),
    _tile_case(_gradient_kernel, _BRAIN, _FLOAT, 16, _PLAIN),
    _tile_case(_gradient_kernel, _BRAIN, _FLOAT, 64, _NO_SUMS | _NO_SEGMENTS),
    _tile_case(_gradient_kernel, _BRAIN, _FLOAT, 64, _NO_SUMS | _NO_DROPOUT),
    _tile_case(_gradient_kernel, _HALF, _FLOAT, 64, _NO_SUMS | _NO_SEGMENTS),
    _tile_case(_expand_kernel, _FLOAT, _FLOAT, 64, _NO_DROPOUT),
    _tile_case(_expand_kernel, _BRAIN, _BRAIN, 64, _NO_DROPOUT),
    _tile_case(_expand_kernel, _BRAIN, _FLOAT, 64, _NO_SEGMENTS),
    _tile_case(_expand_kernel, _HALF, _HALF, 16, _NO_SEGMENTS),
)
