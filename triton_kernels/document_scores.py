# ruff: noqa: N803  compile-time arguments are in capitals, as is usual with Triton
"""What a few query rows attend to; python/rankernel/reference/document_scores.py has the formulas.

The query rows are few and their keys many, so the time is that of reading the keys. A tile multiplies the keys of one
KV head by lines: a line is one of its query heads at one of the rows, and all heads of the group share what is read.
Rows are sorted on the device; where those of every segment begin is all that a program must know to find the rows that
see its keys, and nothing is read by the host.

Forward, a program has a segment, whose log-sum-exp it finds in one pass. Those of all segments make up the softmax over
a list, which the attention mass then evaluates key by key. Both gradients have the form
``dS_rj = exp(S_rj - lse_r) (g - delta_r)``. A program adds up the key gradients of a tile of keys over all lines.
Query gradients are split over segments, and the parts added in a fixed order: no atomics, and the same bits on every
call.

Logits stay natural: on the way to base 2 and back a log-sum-exp would round three times, and exp(S - lse) shows that
where it is large. Products of float32 run on the matrix units as bfloat16 parts that hold all 24 bits (bf16x6).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._common import CompileCase, bounds, list_of, tanh, tile_of

PROGRAMS = 512  # that keep the largest GPUs busy
FILL = 1024  # elements that a program fills
MAX_HEADS = 8  # of a group, in a tile

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # exp(-inf - _LOWEST) is 0, and no NaN as with -inf
_PRECISION = tl.constexpr("bf16x6")


@triton.jit
def _ends_of_list(list_offsets, segment, num_segments, num_lists):
    """First segment and tail of the list that has a segment."""
    first, end = bounds(list_offsets, list_of(list_offsets, segment, num_lists), num_segments)
    return first, tl.maximum(end - 1, 0)


@triton.jit
def _rows_that_see(row_starts, segment, first_segment, tail, CAUSAL: tl.constexpr, ROWS: tl.constexpr):
    """Number of tiles of the rows that see a segment at least in part, and what :func:`_tile` needs to find them.

    They are its own rows and those of the tail. All rows of the list count as the prefix's own, and all that follow as
    own where the list is causal.
    """
    own_begin, list_end = tl.load(row_starts + segment), tl.load(row_starts + tail + 1)
    own_end = list_end
    if not CAUSAL:
        own_end = tl.where(segment == first_segment, list_end, tl.load(row_starts + segment + 1))
    own_tiles = tl.cdiv(tl.maximum(own_end - own_begin, 0), ROWS)
    tail_begin = tl.maximum(tl.load(row_starts + tail), own_end)
    tiles = own_tiles + tl.cdiv(tl.maximum(list_end - tail_begin, 0), ROWS)
    return tiles, (own_tiles, own_begin, own_end, tail_begin - own_tiles * ROWS, list_end)


@triton.jit
def _tile(rows, number, ROWS: tl.constexpr):
    """First row of a tile among the sorted ones, and the end of those it is cut from."""
    own_tiles, own_begin, own_end, tail_begin, list_end = rows
    own = number < own_tiles
    return tl.where(own, own_begin, tail_begin) + number * ROWS, tl.where(own, own_end, list_end)


@triton.jit
def _lines(
    query, positions, order, begin, end, block, kv_head, num_heads,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Of a tile's lines: the queries, for :func:`_load`; their place in [R, Hq]; position; whether they exist."""
    line, left = tl.arange(0, ROWS * HEADS), tl.minimum(end - begin, ROWS).to(tl.int32)
    row, head = line // HEADS, block * HEADS + line % HEADS
    exist = (row < left) & (head < GROUP)
    # Others repeat one that does: a mask that varied from line to line would make loads shorter.
    row, head = tl.maximum(tl.minimum(row, left - 1), 0), tl.minimum(head, GROUP - 1)
    begin, first_head = tl.where(left > 0, begin, 0).to(tl.int64), kv_head * GROUP
    queries = query + (begin * num_heads + first_head) * HEAD_SIZE, (row * num_heads + head) * HEAD_SIZE
    place = tl.load(order + begin + row) * num_heads + (first_head + head)
    return queries, place, tl.load(positions + begin + row), exist


@triton.jit
def _last_key(position, end, wanted):
    """The last key before end that a line sees, or -1."""
    return tl.where(wanted, tl.minimum(position, end - 1), -1).to(tl.int32)


@triton.jit
def _key_lines(key, head, first, left, stride, head_stride, KEYS: tl.constexpr):
    """Keys from the first on, of which so many are left, for :func:`_load`; the last is repeated, as in _lines."""
    own = tl.maximum(tl.minimum(tl.arange(0, KEYS), left - 1), 0)
    return key + (tl.where(left > 0, first, 0).to(tl.int64) * stride + head.to(tl.int64) * head_stride), own * stride


@triton.jit
def _load(lines, first, HEAD_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Columns from the first on of lines, which are an address and what to add to it."""
    columns = first + tl.arange(0, BLOCK)[None, :]
    return tl.load(lines[0] + (lines[1][:, None] + columns), mask=columns < HEAD_SIZE, other=0)


@triton.jit
def _products(x_lines, x, y_lines, y, HEAD_SIZE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """x y^T; blocks of columns that are less than all are loaded anew, for their parts would not fit in registers."""
    if BLOCK == SIZE:
        products = tl.dot(x, tl.trans(y), input_precision=_PRECISION)
    else:
        products = tl.zeros([x.shape[0], y.shape[0]], tl.float32)
        for first in range(0, HEAD_SIZE, BLOCK):
            x_block, y_block = _load(x_lines, first, HEAD_SIZE, BLOCK), _load(y_lines, first, HEAD_SIZE, BLOCK)
            products = tl.dot(x_block, tl.trans(y_block), products, input_precision=_PRECISION)
    return products


@triton.jit
def _logits(products, scale, softcap):
    """Logits, and what their derivative in the products is beside scale."""
    if softcap is None:
        logits, slope = products * scale, 1.0
    else:
        share = tanh(products * (scale / softcap))
        logits, slope = share * softcap, 1 - share * share
    return logits, slope


@triton.jit
def _grad_logits(products, lse, weights, visible, scale, softcap):
    """dS over scale."""
    logits, slope = _logits(products, scale, softcap)
    return tl.where(visible, tl.exp(logits - lse) * weights * slope, 0)


@triton.jit
def _line_gradients(lses, grads, deltas, lines, column, num_columns):
    """Log-sum-exp; g of document_logsumexp, or -delta; and whether anything flows back."""
    if deltas is None:
        place = lines * num_columns + column
        lse, grad = tl.load(lses + place), tl.load(grads + place)
        flows = (lse != float("-inf")) & (grad != 0)
    else:
        lse, grad = tl.load(lses + lines), -tl.load(deltas + lines)
        flows = lines >= 0
    return lse, grad, flows


@triton.jit(do_not_specialize=["row_size", "num_tokens", "num_segments"])
def _fill_kernel(rows, cu_seqlens, out, row_size, num_tokens, num_segments, BLOCK: tl.constexpr):
    """-inf, or NaN in a row that is in no list."""
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(rows + tl.program_id(0))
    inside = (position >= 0) & (position < tl.minimum(tl.load(cu_seqlens + num_segments), num_tokens))
    value = tl.where(inside, float("-inf"), float("nan"))
    tl.store(out + tl.program_id(0).to(tl.int64) * row_size + place, place * 0 + value, mask=place < row_size)


@triton.jit(do_not_specialize=["num_tokens", "num_segments", "num_lists", "num_columns"])
def _lse_kernel(
    query, key, positions, order, row_starts, cu_seqlens, list_offsets, grad, lses, means, num_tokens, num_segments,
    num_lists, num_columns, key_stride, key_head_stride, scale, softcap,
    ALL: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a segment, one that is a document or ALL; where wanted also the mean of grad by its softmax."""
    blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    segment, kv_head = tl.program_id(0), tl.program_id(1) // blocks
    num_heads = tl.num_programs(1) // blocks * GROUP
    first_segment, tail = _ends_of_list(list_offsets, segment, num_segments, num_lists)
    tiles, rows = _rows_that_see(row_starts, segment, first_segment, tail, CAUSAL, ROWS)
    begin, end = bounds(cu_seqlens, segment, num_tokens)
    column = segment - first_segment
    wanted = segment >= first_segment
    if not ALL:
        column -= 1
        wanted = (segment > first_segment) & (segment < tail)
    for tile in range(0, tl.where(wanted & (column < num_columns) & (begin < end), tiles, 0)):
        first_row, rows_end = _tile(rows, tile, ROWS)
        query_lines, place, position, exist = _lines(
            query, positions, order, first_row, rows_end, tl.program_id(1) % blocks, kv_head, num_heads,
            GROUP, HEAD_SIZE, ROWS, HEADS,
        )  # fmt: skip
        last = _last_key(position, end, exist)
        queries = _load(query_lines, 0, HEAD_SIZE, SIZE)
        peak, total = tl.full([ROWS * HEADS], _LOWEST, tl.float32), tl.zeros([ROWS * HEADS], tl.float32)
        weighted = tl.zeros([ROWS * HEADS], tl.float32)
        for first in range(begin, end, KEYS):
            key_lines = _key_lines(key, kv_head, first, end - first, key_stride, key_head_stride, KEYS)
            keys = _load(key_lines, 0, HEAD_SIZE, SIZE)
            products = _products(query_lines, queries, key_lines, keys, HEAD_SIZE, SIZE, BLOCK)
            logits = _logits(products, scale, softcap)[0]
            numbers = first + tl.arange(0, KEYS)
            visible = numbers[None, :] <= last[:, None]
            logits = tl.where(visible, logits, float("-inf"))
            top = tl.maximum(peak, tl.max(logits, axis=1))
            shrink, shares = tl.exp(peak - top), tl.exp(logits - top[:, None])
            total = total * shrink + tl.sum(shares, axis=1)
            if means is not None:
                grads = tl.load(grad + numbers, mask=numbers < end, other=0)
                shares = tl.where(visible, shares * grads[None, :], 0)
                weighted = weighted * shrink + tl.sum(shares, axis=1)
            peak = top
        place = place * num_columns + column
        tl.store(lses + place, peak + tl.log(total), mask=exist)
        if means is not None:
            tl.store(means + place, weighted / total, mask=exist & (total != 0))


@triton.jit(do_not_specialize=["num_tokens", "num_segments", "num_lists"])
def _mass_kernel(
    query, key, positions, order, row_starts, cu_seqlens, list_offsets, lses, mass, num_tokens, num_segments, num_lists,
    key_stride, key_head_stride, scale, softcap,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention that a tile of keys receives from the heads of a group, [KV heads, T]."""
    blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    segment, _, end, first = tile_of(cu_seqlens, num_tokens, num_segments, KEYS)
    kv_head, num_heads = tl.program_id(1), tl.num_programs(1) * GROUP
    first_segment, tail = _ends_of_list(list_offsets, segment, num_segments, num_lists)
    tiles, rows = _rows_that_see(row_starts, segment, first_segment, tail, CAUSAL, ROWS)
    list_rows = tl.load(row_starts + tail + 1) - tl.load(row_starts + first_segment)
    key_lines = _key_lines(key, kv_head, first, end - first, key_stride, key_head_stride, KEYS)
    keys = _load(key_lines, 0, HEAD_SIZE, SIZE)
    numbers = first + tl.arange(0, KEYS)
    total = tl.zeros([KEYS], tl.float32)
    for step in tl.range(0, tl.where(first < end, tiles * blocks, 0), num_stages=1):
        first_row, rows_end = _tile(rows, step // blocks, ROWS)
        query_lines, place, position, exist = _lines(
            query, positions, order, first_row, rows_end, step % blocks, kv_head, num_heads,
            GROUP, HEAD_SIZE, ROWS, HEADS,
        )  # fmt: skip
        last = _last_key(position, end, exist)
        queries = _load(query_lines, 0, HEAD_SIZE, SIZE)
        products = _products(key_lines, keys, query_lines, queries, HEAD_SIZE, SIZE, BLOCK)
        shares = tl.exp(_logits(products, scale, softcap)[0] - tl.load(lses + place)[None, :])
        total += tl.sum(tl.where(numbers[:, None] <= last[None, :], shares, 0), axis=1)
    out = mass + kv_head.to(tl.int64) * num_tokens + numbers
    tl.store(out, total / tl.maximum(list_rows, 1), mask=numbers < end)


@triton.jit(do_not_specialize=["num_tokens", "num_segments", "num_lists", "num_columns"])
def _grad_key_kernel(
    query, key, positions, order, row_starts, cu_seqlens, list_offsets, lses, grads, deltas, grad_key, num_tokens,
    num_segments, num_lists, num_columns, key_stride, key_head_stride, scale, softcap,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of keys; of the attention mass where deltas are given."""
    blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    segment, _, end, first = tile_of(cu_seqlens, num_tokens, num_segments, KEYS)
    kv_head, num_heads = tl.program_id(1), tl.num_programs(1) * GROUP
    first_segment, tail = _ends_of_list(list_offsets, segment, num_segments, num_lists)
    tiles, rows = _rows_that_see(row_starts, segment, first_segment, tail, CAUSAL, ROWS)
    key_lines = _key_lines(key, kv_head, first, end - first, key_stride, key_head_stride, KEYS)
    keys = _load(key_lines, 0, HEAD_SIZE, SIZE)
    numbers = first + tl.arange(0, KEYS)
    column = segment - first_segment - 1
    wanted = first < end
    if deltas is None:
        wanted &= (column >= 0) & (segment < tail) & (column < num_columns)
    else:
        share = 1.0 / (tl.load(row_starts + tail + 1) - tl.load(row_starts + first_segment))
        token_grads = tl.load(grads + numbers, mask=numbers < end, other=0)[:, None]
    total = tl.zeros([KEYS, SIZE], tl.float32)
    for step in tl.range(0, tl.where(wanted, tiles * blocks, 0), num_stages=1):
        first_row, rows_end = _tile(rows, step // blocks, ROWS)
        query_lines, place, position, exist = _lines(
            query, positions, order, first_row, rows_end, step % blocks, kv_head, num_heads,
            GROUP, HEAD_SIZE, ROWS, HEADS,
        )  # fmt: skip
        lse, grad, flows = _line_gradients(lses, grads, deltas, place, column, num_columns)
        last = _last_key(position, end, exist & flows)
        queries = _load(query_lines, 0, HEAD_SIZE, SIZE)
        products = _products(key_lines, keys, query_lines, queries, HEAD_SIZE, SIZE, BLOCK)
        weights = grad[None, :]
        if deltas is not None:
            weights = (token_grads + weights) * share
        visible = numbers[:, None] <= last[None, :]
        grad_logits = _grad_logits(products, lse[None, :], weights, visible, scale, softcap)
        # NaN times 0 would spread to every key. Where something flows it shows in grad_logits.
        queries = tl.where(tl.abs(queries) < float("inf"), queries, 0)
        total = tl.dot(grad_logits.to(queries.dtype), queries, total, input_precision=_PRECISION)
    columns = tl.arange(0, SIZE)[None, :]
    out = grad_key + (first.to(tl.int64) * tl.num_programs(1) + kv_head) * HEAD_SIZE
    out += tl.arange(0, KEYS)[:, None] * (tl.num_programs(1) * HEAD_SIZE) + columns
    tl.store(out, total * scale, mask=(numbers < end)[:, None] & (columns < HEAD_SIZE))


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_segments", "num_lists", "num_columns"])
def _grad_query_kernel(
    query, key, positions, order, row_starts, list_rows, cu_seqlens, list_offsets, lses, grads, deltas, parts,
    num_tokens, num_rows, num_segments, num_lists, num_columns, key_stride,
    key_head_stride, scale, softcap,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What every so many segments add to the gradient of a tile of lines, [parts, R, Hq, D]."""
    blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    number_of_list, rows_begin, rows_end, first_row = tile_of(list_rows, num_rows, num_lists, ROWS)
    part, kv_head = tl.program_id(2), tl.program_id(1) // blocks
    num_heads = tl.num_programs(1) // blocks * GROUP
    first_segment, end_segment = bounds(list_offsets, number_of_list, num_segments)
    query_lines, lines, position, exist = _lines(
        query, positions, order, first_row, rows_end, tl.program_id(1) % blocks, kv_head, num_heads,
        GROUP, HEAD_SIZE, ROWS, HEADS,
    )  # fmt: skip
    tail_begin, _ = bounds(cu_seqlens, tl.maximum(end_segment - 1, 0), num_tokens)
    queries = _load(query_lines, 0, HEAD_SIZE, SIZE)
    total = tl.zeros([ROWS * HEADS, SIZE], tl.float32)
    share = 1.0 / (rows_end - rows_begin)
    begin_segment = first_segment
    if deltas is None:
        begin_segment += 1
        end_segment = tl.minimum(end_segment - 1, begin_segment + num_columns)
    for segment in range(
        begin_segment + part, tl.where(first_row < rows_end, end_segment, begin_segment), tl.num_programs(2)
    ):
        begin, end = bounds(cu_seqlens, segment, num_tokens)
        lse, grad, flows = _line_gradients(lses, grads, deltas, lines, segment - begin_segment, num_columns)
        flows &= exist & (position >= begin)
        if not CAUSAL:
            flows &= (position < end) | (position >= tail_begin) | (segment == first_segment)
        last = _last_key(position, end, flows)
        for first in range(begin, tl.max(last, axis=0) + 1, KEYS):
            key_lines = _key_lines(key, kv_head, first, end - first, key_stride, key_head_stride, KEYS)
            keys = _load(key_lines, 0, HEAD_SIZE, SIZE)
            numbers = first + tl.arange(0, KEYS)
            products = _products(query_lines, queries, key_lines, keys, HEAD_SIZE, SIZE, BLOCK)
            weights = grad[:, None]
            if deltas is not None:
                weights = (tl.load(grads + numbers, mask=numbers < end, other=0)[None, :] + weights) * share
            visible = numbers[None, :] <= last[:, None]
            grad_logits = _grad_logits(products, lse[:, None], weights, visible, scale, softcap)
            products = tl.dot(grad_logits.to(keys.dtype), keys, input_precision=_PRECISION)
            total += tl.where((last >= 0)[:, None], products, 0)  # of a NaN key not even 0 times it
    columns = tl.arange(0, SIZE)[None, :]
    out = parts + part.to(tl.int64) * num_rows * num_heads * HEAD_SIZE + (lines * HEAD_SIZE)[:, None] + columns
    tl.store(out, total * scale, mask=exist[:, None] & (columns < HEAD_SIZE))


class _Call:
    """Arguments of one call as the kernels take them, and the launches."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        rows: torch.Tensor,
        cu_seqlens: torch.Tensor,
        list_offsets: torch.Tensor,
        causal: bool,
        max_documents: int,
        scale: float,
        softcap: float | None,
    ) -> None:
        self.query, self.key, self.rows = query, key, rows
        self.cu_seqlens, self.list_offsets, self.max_documents = cu_seqlens, list_offsets, max_documents
        self.num_tokens, self.num_rows = key.shape[0], query.shape[0]
        self.num_segments, self.num_lists = cu_seqlens.shape[0] - 1, list_offsets.shape[0] - 1
        self.empty = not (self.num_tokens and self.num_rows and self.num_segments and self.num_lists)
        self.numbers = (*key.stride()[:2], scale, softcap)
        self.causal, self.group, self.kv_heads = causal, query.shape[1] // key.shape[1], key.shape[1]
        self.blocks = self.kv_heads * triton.cdiv(self.group, MAX_HEADS)
        if not self.empty:
            positions, order = torch.sort(rows, stable=True)
            # The first row at or after the begin of every segment.
            self.row_starts = torch.searchsorted(positions, cu_seqlens.to(torch.int64), out_int32=True)
            self.of_rows = (query[order], key, positions, order, self.row_starts)

    def sizes(self, kernel: Any) -> dict[str, Any]:
        return _sizes(kernel, self.group, self.query.shape[2], self.query.dtype)

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        with torch.cuda.device_of(self.query):
            kernel[grid](*arguments, **constants, enable_fp_fusion=True)

    def attend(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        constants |= self.sizes(kernel) | {"CAUSAL": self.causal}
        self.launch(kernel, grid, *self.of_rows, *arguments, *self.numbers, **constants)

    def per_key_tile(self, kernel: Any, *arguments: Any) -> None:
        tiles = self.num_tokens // self.sizes(kernel)["KEYS"] + self.num_segments
        self.attend(kernel, (tiles, self.kv_heads), self.cu_seqlens, self.list_offsets, *arguments)

    def log_sum_exps(
        self, every: bool, grad: torch.Tensor | None = None, means: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Of the documents, [R, Hq, max_documents], or with prefix and tail of ``every`` segment, two more."""
        num_columns = self.max_documents + 2 * every
        out = self.query.new_empty((*self.query.shape[:2], num_columns), dtype=torch.float32)
        row_size = self.query.shape[1] * num_columns
        if out.numel():
            self.launch(
                _fill_kernel, (self.num_rows, triton.cdiv(row_size, FILL)), self.rows, self.cu_seqlens, out, row_size,
                self.num_tokens, self.num_segments, BLOCK=FILL, num_warps=8,
            )  # fmt: skip
            if not self.empty:
                self.attend(
                    _lse_kernel, (self.num_segments, self.blocks), self.cu_seqlens, self.list_offsets, grad, out, means,
                    self.num_tokens, self.num_segments, self.num_lists, num_columns, ALL=every,
                )  # fmt: skip
        return out

    def gradients(
        self, lses: torch.Tensor, grads: torch.Tensor, deltas: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.empty or (deltas is None and not self.max_documents):
            return self.query.new_zeros(self.query.shape), self.key.new_zeros(self.key.shape)
        grad_key = self.key.new_empty(self.key.shape)
        self.per_key_tile(
            _grad_key_kernel, lses, grads, deltas, grad_key, self.num_tokens, self.num_segments, self.num_lists,
            self.max_documents,
        )  # fmt: skip
        # Tiles of rows that end with their list.
        tiles = self.num_rows // self.sizes(_grad_query_kernel)["ROWS"] + self.num_lists
        list_rows = self.row_starts[self.list_offsets.clamp(0, self.num_segments)]
        num_parts = max(min(PROGRAMS // (tiles * self.blocks), self.num_segments), 1)
        # Zeros for rows of no list, which are in no tile.
        parts = self.query.new_zeros((num_parts, *self.query.shape), dtype=torch.float32)
        self.attend(
            _grad_query_kernel, (tiles, self.blocks, num_parts), list_rows, self.cu_seqlens, self.list_offsets, lses,
            grads, deltas, parts, self.num_tokens, self.num_rows, self.num_segments, self.num_lists, self.max_documents,
        )  # fmt: skip
        return parts.sum(0).to(self.query.dtype), grad_key


def _sizes(kernel: Any, group: int, head_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Of the tiles, as large as the registers of every GPU allow; 64 lines are what Hopper's matrix units take."""
    size = max(triton.next_power_of_2(head_size), 16)
    wide, exact = size > 128, dtype == torch.float32
    if kernel is _grad_key_kernel:
        lines, keys, warps = 16, 16 if exact else 32 if wide else 64, 4
    elif kernel is _grad_query_kernel:
        lines, keys, warps = 16 if exact or wide else 32, 32, 4 if wide and not exact else 8
    elif exact:
        lines, keys, warps = 16, 32, 4 if wide else 8
    else:
        lines, keys, warps = (32, 16, 8) if wide else (64, 64, 8)
    heads = min(triton.next_power_of_2(group), MAX_HEADS)
    return {
        "GROUP": group, "HEAD_SIZE": head_size, "SIZE": size, "ROWS": lines // heads, "HEADS": heads, "KEYS": keys,
        "BLOCK": 16 if exact else size, "num_warps": warps,
    }  # fmt: skip


def document_logsumexp(query: torch.Tensor, key: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """See :func:`rankernel.document_logsumexp`. Never waits for the device.

    A layout that its tensors do not describe, or that is not that of the keys, gives an unspecified result, but nothing
    outside the tensors is read or written.

    Args:
        query: [R, Hq, D], float32, bfloat16 or float16, last dimension contiguous, D at most 256.
        key: [T, Hkv, D], dtype of query, last dimension contiguous.
        arguments: rows, int64 [R], contiguous; cu_seqlens and list_offsets, int32; causal; max_documents; scale;
            softcap, positive, or None.

    Returns:
        float32 [R, Hq, max_documents], NaN for rows outside the lists.
    """
    return _Call(query, key, *arguments).log_sum_exps(every=False)


def token_attention_mass(query: torch.Tensor, key: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """See :func:`rankernel.token_attention_mass` and :func:`document_logsumexp`; rows outside the lists do not count.

    Returns:
        float32 [T].
    """
    call = _Call(query, key, *arguments)
    if call.empty:
        return key.new_zeros(key.shape[0], dtype=torch.float32)
    lse = call.log_sum_exps(every=True).logsumexp(dim=-1)
    mass = key.new_empty((key.shape[1], key.shape[0]), dtype=torch.float32)
    call.per_key_tile(_mass_kernel, lse, mass, call.num_tokens, call.num_segments, call.num_lists)
    return mass.sum(0)


def document_logsumexp_backward(
    grad: torch.Tensor, result: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of query and key, of their dtype, contiguous; grad and result contiguous."""
    return _Call(query, key, *arguments).gradients(result, grad, None)


def token_attention_mass_backward(
    grad: torch.Tensor, result: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`document_logsumexp_backward`."""
    call = _Call(query, key, *arguments)
    means = query.new_zeros((*query.shape[:2], call.max_documents + 2), dtype=torch.float32)
    lses = call.log_sum_exps(True, grad, means)
    lse = lses.logsumexp(dim=-1)
    deltas = ((lses - lse[..., None]).exp() * means).sum(-1)
    return call.gradients(lse, grad, deltas)


_TYPES = {
    "rows": "*i64", "positions": "*i64", "order": "*i64", "row_starts": "*i32", "list_rows": "*i32",
    "cu_seqlens": "*i32", "list_offsets": "*i32", "scale": "fp32", "softcap": "fp32",
} | dict.fromkeys(("grad", "grads", "deltas", "lses", "means", "mass", "parts", "out"), "*fp32")  # fmt: skip
_FLOAT, _BRAIN, _HALF = torch.float32, torch.bfloat16, torch.float16
_NO_SOFTCAP, _NO_MEANS, _NO_DELTAS = {"softcap": None}, {"grad": None, "means": None}, {"deltas": None}


def _case(kernel: Any, dtype: torch.dtype, group: int, head_size: int, constants: dict[str, object]) -> CompileCase:
    names = {_FLOAT: "*fp32", _BRAIN: "*bf16", _HALF: "*fp16"}
    types = _TYPES | dict.fromkeys(("query", "key", "grad_key"), names[dtype])
    sizes = _sizes(kernel, group, head_size, dtype)
    constants = {"CAUSAL": False, "ALL": False} | sizes | constants
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*") or name.endswith("stride"))
    return CompileCase(kernel, signature, constants, sizes["num_warps"], aligned=aligned)


COMPILE_CASES = (
    _case(_fill_kernel, _FLOAT, 1, 16, {"BLOCK": FILL}),
    _case(_lse_kernel, _BRAIN, 4, 128, _NO_MEANS | _NO_SOFTCAP),
    _case(_lse_kernel, _BRAIN, 1, 256, {"ALL": True}),
    _case(_lse_kernel, _HALF, 16, 80, {"CAUSAL": True} | _NO_MEANS),
    _case(_lse_kernel, _FLOAT, 4, 128, _NO_MEANS | _NO_SOFTCAP),
    _case(_lse_kernel, _FLOAT, 1, 256, {"ALL": True}),
    _case(_mass_kernel, _BRAIN, 4, 128, _NO_SOFTCAP),
    _case(_mass_kernel, _BRAIN, 2, 256, {"CAUSAL": True}),
    _case(_mass_kernel, _FLOAT, 7, 128, _NO_SOFTCAP),
    _case(_mass_kernel, _FLOAT, 16, 256, {}),
    _case(_grad_key_kernel, _BRAIN, 4, 128, _NO_DELTAS | _NO_SOFTCAP),
    _case(_grad_key_kernel, _BRAIN, 16, 256, {"CAUSAL": True}),
    _case(_grad_key_kernel, _HALF, 2, 64, _NO_DELTAS),
    _case(_grad_key_kernel, _FLOAT, 4, 128, _NO_SOFTCAP),
    _case(_grad_key_kernel, _FLOAT, 1, 256, _NO_DELTAS),
    _case(_grad_query_kernel, _BRAIN, 4, 128, _NO_DELTAS | _NO_SOFTCAP),
    _case(_grad_query_kernel, _BRAIN, 16, 256, {"CAUSAL": True}),
    _case(_grad_query_kernel, _HALF, 2, 64, _NO_DELTAS),
    _case(_grad_query_kernel, _FLOAT, 4, 128, _NO_SOFTCAP),
    _case(_grad_query_kernel, _FLOAT, 1, 256, _NO_DELTAS),
)
