# ruff: noqa: N803  compile-time arguments are in capitals, as is usual with Triton
"""Block-sparse in-context-ranking attention; python/rankernel/reference/block_attention.py has the formulas.

Every call begins with a plan: :func:`_plan_kernel` lists on the device which tile of a segment meets which tokens,
longest first. So nothing waits for the host, and a captured graph serves every layout that fits its sizes. A tile never
leaves its segment, and its rows are tokens times the query heads of one KV head: keys are read once for all of them,
and tiles of 128 rows are only 32 tokens high where 4 heads share keys, which is what keeps work on short documents near
what their mask asks for.

A tile meets two ranges of tokens: the near one, which the diagonal ends, and the far one, all of which it sees
(forward: documents the prefix, the tail all before it; backward, by keys: documents the tail, the prefix all behind
it). Both are walked in one loop of full blocks, without a mask, and then one of partial blocks. The far range of a
tail, or of a prefix by keys, is long while their tiles are few: it is split into parts of about CHUNK tokens, which a
second kernel adds up in a fixed order. No atomics, and the same bits on every call.

Logits are in base 2, and the scale and log2(e) are one factor. Softmax and sums are float32. Products of float32 are
IEEE, without matrix units: split into products of bfloat16 or tf32 they take more registers than there are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._common import CompileCase, bounds, list_of, tanh

CHUNK = 1024  # tokens of a far range that one program walks
SHARE = 4  # partial results are those of at most 1 / SHARE as many tokens as there are
FIELDS = 10  # of a tile in a plan, see _plan_kernel
BLOCK = 128  # places that one step of the plan fills
ROWS = 16  # of a partial result, that one step adds up
PRECISION = "ieee"  # of products of float32
STAGES = 2
LOG2E = 1.4426950408889634

_FIELDS = tl.constexpr(FIELDS)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # finite: its difference to -inf is no NaN
_LOG2E, _LN2 = tl.constexpr(LOG2E), tl.constexpr(0.6931471805599453)


@triton.jit
def _clamped(offsets, numbers, inside, num_items):
    return tl.minimum(tl.maximum(tl.load(offsets + numbers, mask=inside, other=0), 0), num_items)


@triton.jit(do_not_specialize=["num_tokens", "num_segments", "num_lists", "first_short", "num_places"])
def _plan_kernel(
    cu_seqlens, list_offsets, plan, num_tokens, num_segments, num_lists, first_short, num_places,
    BY_KEYS: tl.constexpr, CAUSAL: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the tiles of a segment: begin, end, near range, far range, number of parts, part, place, step.

    Token t of a tile has its partial result in row ``place + t + part step`` of all partial results. Where there is
    more than one part they come first, list l's from a place that depends on the tokens before it and on l alone. The
    others stand behind tiles of longer segments, which every program counts anew. Unused places stay zero. Whatever
    the offsets hold, ranges lie inside the tokens and what is written inside the plan.
    """
    segment = tl.program_id(0)
    begin, end = bounds(cu_seqlens, segment, num_tokens)
    length = end - begin
    number = list_of(list_offsets, segment, num_lists)
    first, last = bounds(list_offsets, number, num_segments)
    last = tl.maximum(last - 1, first)
    list_begin, prefix_end = bounds(cu_seqlens, tl.minimum(first, num_segments - 1), num_tokens)
    tail_begin, list_end = bounds(cu_seqlens, tl.minimum(last, num_segments - 1), num_tokens)

    near_begin, near_end, far_begin, far_end = begin, end, begin, begin
    if CAUSAL:
        if BY_KEYS:
            near_end = tl.maximum(list_end, end)
        else:
            near_begin = tl.minimum(list_begin, begin)
    elif segment == first:
        if BY_KEYS:
            far_begin, far_end = prefix_end, list_end
    elif segment == last:
        if not BY_KEYS:
            far_begin, far_end = list_begin, begin
    else:
        if BY_KEYS:
            far_begin, far_end = tail_begin, list_end
        else:
            far_begin, far_end = list_begin, prefix_end

    far_end = tl.maximum(far_begin, far_end)

    tiles = tl.cdiv(length, TILE)
    parts = tiles * 0 + 1
    if not CAUSAL and ((segment == last) & (not BY_KEYS)) | ((segment == first) & BY_KEYS):
        room = (list_end - list_begin) // (SHARE * tl.maximum(length, 1))
        parts = tl.maximum(tl.minimum(tl.cdiv(far_end - far_begin, CHUNK), room), 1)
    if parts > 1:
        # tiles parts <= (length / TILE + 1) parts <= tokens / (SHARE TILE) + tokens / CHUNK + 1
        slot = list_begin // (SHARE * TILE) + list_begin // CHUNK + 2 * number
    else:
        slot = first_short
        for start in range(0, num_segments, BLOCK):
            others = start + tl.arange(0, BLOCK)
            inside = others < num_segments
            other_begin = _clamped(cu_seqlens, others, inside, num_tokens)
            other_end = tl.maximum(_clamped(cu_seqlens, others + 1, inside, num_tokens), other_begin)
            if CAUSAL and BY_KEYS:
                longer, equal = other_begin < begin, other_begin == begin
            elif CAUSAL:
                longer, equal = other_end > end, other_end == end
            else:
                longer, equal = other_end - other_begin > length, other_end - other_begin == length
            before = inside & (longer | (equal & (others < segment)))
            slot += tl.sum(tl.where(before, tl.cdiv(other_end - other_begin, TILE), 0), axis=0)

    size = tl.cdiv(far_end - far_begin, parts)
    for start in range(0, tiles * parts, BLOCK):
        index = start + tl.arange(0, BLOCK)
        part, tile = index // tl.maximum(tiles, 1), index % tl.maximum(tiles, 1)
        if not BY_KEYS:
            tile = tiles - 1 - tile
        own_begin = begin + tile * TILE
        own_end = tl.minimum(own_begin + TILE, end)
        if BY_KEYS:
            from_token, to_token = own_begin, tl.where(part == 0, near_end, own_begin)
        else:
            from_token, to_token = tl.where(part == 0, near_begin, own_end), own_end
        part_begin = tl.minimum(far_begin + part * size, far_end)
        part_end = tl.minimum(part_begin + size, far_end)
        place = list_begin // SHARE - begin
        out = plan + (slot + index) * _FIELDS
        inside = (index < tiles * parts) & (slot + index < num_places)
        tl.store(out, own_begin, mask=inside)
        tl.store(out + 1, own_end, mask=inside)
        tl.store(out + 2, from_token, mask=inside)
        tl.store(out + 3, to_token, mask=inside)
        tl.store(out + 4, part_begin, mask=inside)
        tl.store(out + 5, part_end, mask=inside)
        tl.store(out + 6, tl.zeros_like(index) + parts, mask=inside)
        tl.store(out + 7, part, mask=inside)
        tl.store(out + 8, tl.zeros_like(index) + place, mask=inside)
        tl.store(out + 9, tl.zeros_like(index) + length, mask=inside)


@triton.jit
def _tile(plan, num_units):
    """This program's unit, a KV head or some of the heads that share one, and its tile in the plan."""
    tile = plan + (tl.program_id(0) // num_units).to(tl.int64) * _FIELDS
    return tl.program_id(0) % num_units, tile, tl.load(tile), tl.load(tile + 1)


@triton.jit
def _place(tile, begin):
    """Of the first token of a tile's part, among the partial results."""
    return begin + tl.load(tile + 8) + tl.load(tile + 7) * tl.load(tile + 9)


@triton.jit
def _heads_of(unit, rows, GROUP: tl.constexpr, HEADS: tl.constexpr):
    """KV head of a unit, its first query head, and of every row its head from there on, and whether it exists."""
    blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head, first, head = unit // blocks, unit % blocks * HEADS, rows % HEADS
    return kv_head, kv_head * GROUP + first, head, head < GROUP - first


@triton.jit
def _at(pointer, token, head, token_stride, head_stride):
    """64-bit, for one scalar; offsets in a tile are 32-bit, which takes half the registers."""
    return pointer + (token.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride)


@triton.jit
def _load(pointer, offsets, inside, D: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH], zero where not inside and beyond D."""
    columns = tl.arange(0, WIDTH)[None, :]
    mask = inside[:, None] if D == WIDTH else inside[:, None] & (columns < D)
    return tl.load(pointer + (offsets[:, None] + columns), mask=mask, other=0)


@triton.jit
def _store(pointer, offsets, inside, x, D: tl.constexpr):
    columns = tl.arange(0, x.shape[1])[None, :]
    tl.store(pointer + (offsets[:, None] + columns), x, mask=inside[:, None] & (columns < D))


@triton.jit
def _logits(products, scale, softcap):
    """x and a factor: x factor are the logits in base 2, x their tanh under a softcap; scale: see _Call."""
    if softcap is None:
        x, factor = products, scale
    else:
        x, factor = tanh(products * scale), softcap * _LOG2E
    return x, factor


@triton.jit
def _block(index, num_far, far_begin, far_end, near_begin, near_end, SIZE: tl.constexpr):
    """Begin of a block, of which the far range's come first, and end of its range."""
    far = index < num_far
    begin = tl.where(far, far_begin + index * SIZE, near_begin + (index - num_far) * SIZE)
    return begin, tl.where(far, far_end, near_end)


@triton.jit
def _key_ranges(tile, begin, window, KEYS: tl.constexpr):
    """Where a tile of rows finds its keys.

    Begin of the full blocks, their number, and that of those in the far range; the same of partial blocks; ends.
    """
    near_begin, near_end = tl.load(tile + 2), tl.load(tile + 3)
    far_begin, far_end = tl.load(tile + 4), tl.load(tile + 5)
    if window is not None:
        first = begin - tl.minimum(window - 1, begin).to(tl.int32)
        near_begin = tl.minimum(tl.maximum(near_begin, first), near_end)
        far_begin = tl.minimum(tl.maximum(far_begin, first), far_end)
    num_far = (far_end - far_begin) // KEYS
    num_near = tl.maximum(begin - near_begin, 0) // KEYS
    full = far_begin, near_begin, num_far, num_far + num_near
    far_begin, near_begin = far_begin + num_far * KEYS, near_begin + num_near * KEYS
    num_far = tl.cdiv(far_end - far_begin, KEYS)
    return full, (far_begin, near_begin, num_far, num_far + tl.cdiv(near_end - near_begin, KEYS)), far_end, near_end


@triton.jit
def _masked(x, distance, inside, window):
    """x where a row, ``distance`` tokens behind a key, sees it."""
    visible = (distance >= 0) & inside
    if window is not None:
        visible = visible & (distance < window)
    return tl.where(visible, x, float("-inf"))


@triton.jit(do_not_specialize=["window"])
def _forward_kernel(
    query, key, value, plan, sinks, out, lse, part_out, part_lse, num_heads, num_units, query_token, query_head,
    key_token, key_head, value_token, value_head, scale, softcap, window,
    D: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    unit, tile, begin, end = _tile(plan, num_units)
    if begin >= end:
        return
    rows, keys = tl.arange(0, TILE * HEADS), tl.arange(0, KEYS)
    kv_head, first_head, heads, exist = _heads_of(unit, rows, GROUP, HEADS)
    tokens = rows // HEADS
    exist = exist & (tokens < end - begin)
    q = _at(query, begin, first_head, query_token, query_head)
    q = _load(q, tokens * query_token + heads * query_head, exist, D, WIDTH)
    peak = tl.full([TILE * HEADS], _LOWEST, tl.float32)
    total = tl.zeros([TILE * HEADS], tl.float32)
    sums = tl.zeros([TILE * HEADS, WIDTH], tl.float32)
    full, partial, far_end, near_end = _key_ranges(tile, begin, window, KEYS)
    for masked in tl.static_range(2):
        far_begin, near_begin, num_far, num_blocks = partial if masked else full
        for index in range(num_blocks):
            start, stop = _block(index, num_far, far_begin, far_end, near_begin, near_end, KEYS)
            inside = keys < (stop - start if masked else KEYS)
            k = _load(_at(key, start, kv_head, key_token, key_head), keys * key_token, inside, D, WIDTH)
            v = _load(_at(value, start, kv_head, value_token, value_head), keys * value_token, inside, D, WIDTH)
            x, factor = _logits(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap)
            if masked or window is not None:
                x = _masked(x, (begin - start) + tokens[:, None] - keys[None, :], inside[None, :], window)
            highest = tl.maximum(peak, tl.max(x, axis=1) * factor)
            p = tl.exp2(x * factor - highest[:, None])
            fade = tl.exp2(peak - highest)
            total = total * fade + tl.sum(p, axis=1)
            sums = tl.dot(p.to(v.dtype), v, sums * fade[:, None], input_precision=PRECISION)
            peak = highest
    offsets = tokens * num_heads + heads
    if tl.load(tile + 6) > 1:
        place = _place(tile, begin)
        logit = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1)), float("-inf"))
        tl.store(_at(part_lse, place, first_head, num_heads, 1) + offsets, logit, mask=exist)
        sums = sums / tl.where(total > 0, total, 1)[:, None]
        _store(_at(part_out, place, first_head, num_heads * D, D), offsets * D, exist, sums, D)
    else:
        if sinks is not None:
            sink = tl.load(sinks + first_head + heads, mask=exist, other=0) * _LOG2E
            highest = tl.maximum(peak, sink)
            fade = tl.exp2(peak - highest)
            total = total * fade + tl.exp2(sink - highest)
            sums = sums * fade[:, None]
            peak = highest
        logit = (peak + tl.log2(total)) * _LN2
        tl.store(_at(lse, begin, first_head, num_heads, 1) + offsets, logit, mask=exist)
        _store(_at(out, begin, first_head, num_heads * D, D), offsets * D, exist, sums / total[:, None], D)


@triton.jit
def _combine_kernel(
    part_out, part_lse, plan, sinks, out, lse, num_heads, num_units, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Adds up the partial results of a tile, weighted with their part of the softmax where they have one.

    The programs of the tile's parts share its rows.
    """
    unit, tile, begin, end = _tile(plan, num_units)
    parts, step = tl.maximum(tl.load(tile + 6), 1), tl.load(tile + 9)
    first_part = begin + tl.load(tile + 8)
    for block in range(tl.load(tile + 7), tl.where(begin < end, TILE * HEADS // ROWS, 0), parts):
        rows = block * ROWS + tl.arange(0, ROWS)
        _, first_head, heads, exist = _heads_of(unit, rows, GROUP, HEADS)
        exist = exist & (rows // HEADS < end - begin)
        offsets = rows // HEADS * num_heads + heads
        peak = tl.full([ROWS], _LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        if sinks is not None:
            peak, total = tl.load(sinks + first_head + heads, mask=exist, other=0) * _LOG2E, total + 1
        sums = tl.zeros([ROWS, WIDTH], tl.float32)
        for part in range(parts):
            place = first_part + part * step
            more = _load(_at(part_out, place, first_head, num_heads * D, D), offsets * D, exist, D, WIDTH)
            if part_lse is not None:
                logit = tl.load(_at(part_lse, place, first_head, num_heads, 1) + offsets, mask=exist, other=0)
                highest = tl.maximum(peak, logit)
                fade, weight = tl.exp2(peak - highest), tl.exp2(logit - highest)
                total = total * fade + weight
                sums = sums * fade[:, None] + more * weight[:, None]
                peak = highest
            else:
                sums += more
        if part_lse is not None:
            logit = (peak + tl.log2(total)) * _LN2
            tl.store(_at(lse, begin, first_head, num_heads, 1) + offsets, logit, mask=exist)
            sums = sums / tl.where(exist, total, 1)[:, None]
        _store(_at(out, begin, first_head, num_heads * D, D), offsets * D, exist, sums * scale, D)


@triton.jit(do_not_specialize=["num_rows"])
def _delta_kernel(
    grad_out, out, grad_lse, delta, num_rows, num_heads, out_token, out_head,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta = sum(dO O) - dlse per row; rows are tokens times heads, out is contiguous."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    gradient = _load(grad_out, rows // num_heads * out_token + rows % num_heads * out_head, inside, D, WIDTH)
    result = _load(out, rows * D, inside, D, WIDTH)
    found = tl.sum(gradient.to(tl.float32) * result.to(tl.float32), axis=1)
    tl.store(delta + rows, found - tl.load(grad_lse + rows, mask=inside, other=0), mask=inside)


@triton.jit
def _grad_logits(x, factor, grad_p, lse, delta, softcap):
    """P and dS: P (dP - delta), and with a softcap times 1 - tanh^2."""
    p = tl.exp2(x * factor - lse)
    grad = p * (grad_p - delta)
    if softcap is not None:
        grad = grad * tl.where(p > 0, 1 - x * x, 0)  # masked x are -inf
    return p, grad


@triton.jit(do_not_specialize=["window"])
def _grad_query_kernel(
    query, key, value, grad_out, lse, delta, plan, grad_query, part_grad, num_heads, num_units, query_token,
    query_head, key_token, key_head, value_token, value_head, out_token, out_head, scale, softcap, window, grad_scale,
    D: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    unit, tile, begin, end = _tile(plan, num_units)
    if begin >= end:
        return
    rows, keys = tl.arange(0, TILE * HEADS), tl.arange(0, KEYS)
    kv_head, first_head, heads, exist = _heads_of(unit, rows, GROUP, HEADS)
    tokens = rows // HEADS
    exist = exist & (tokens < end - begin)
    q = _at(query, begin, first_head, query_token, query_head)
    q = _load(q, tokens * query_token + heads * query_head, exist, D, WIDTH)
    g = _at(grad_out, begin, first_head, out_token, out_head)
    g = _load(g, tokens * out_token + heads * out_head, exist, D, WIDTH)
    offsets = tokens * num_heads + heads
    row_lse = tl.load(_at(lse, begin, first_head, num_heads, 1) + offsets, mask=exist, other=0)[:, None] * _LOG2E
    row_delta = tl.load(_at(delta, begin, first_head, num_heads, 1) + offsets, mask=exist, other=0)[:, None]
    sums = tl.zeros([TILE * HEADS, WIDTH], tl.float32)
    full, partial, far_end, near_end = _key_ranges(tile, begin, window, KEYS)
    for masked in tl.static_range(2):
        far_begin, near_begin, num_far, num_blocks = partial if masked else full
        for index in range(num_blocks):
            start, stop = _block(index, num_far, far_begin, far_end, near_begin, near_end, KEYS)
            inside = keys < (stop - start if masked else KEYS)
            k = _load(_at(key, start, kv_head, key_token, key_head), keys * key_token, inside, D, WIDTH)
            v = _load(_at(value, start, kv_head, value_token, value_head), keys * value_token, inside, D, WIDTH)
            x, factor = _logits(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap)
            if masked or window is not None:
                x = _masked(x, (begin - start) + tokens[:, None] - keys[None, :], inside[None, :], window)
            grad_p = tl.dot(g, tl.trans(v), input_precision=PRECISION)
            _, grad = _grad_logits(x, factor, grad_p, row_lse, row_delta, softcap)
            sums = tl.dot(grad.to(k.dtype), k, sums, input_precision=PRECISION)
    if tl.load(tile + 6) > 1:
        place = _place(tile, begin)
        _store(_at(part_grad, place, first_head, num_heads * D, D), offsets * D, exist, sums, D)
    else:
        sums *= grad_scale
        _store(_at(grad_query, begin, first_head, num_heads * D, D), offsets * D, exist, sums, D)


@triton.jit(do_not_specialize=["window"])
def _grad_key_kernel(
    query, key, value, grad_out, lse, delta, plan, grad_key, grad_value, part_grad_key, part_grad_value, num_heads,
    num_units, query_token, query_head, key_token, key_head, value_token, value_head, out_token, out_head, scale,
    softcap, window, grad_scale,
    D: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
    TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of keys, by all rows that see them: those of the diagonal first, then whole blocks of TOKENS tokens."""
    kv_head, tile, begin, end = _tile(plan, num_units)
    if begin >= end:
        return
    rows, keys = tl.arange(0, TOKENS * HEADS), tl.arange(0, TILE)
    tokens = rows // HEADS
    exist = keys < end - begin
    k = _load(_at(key, begin, kv_head, key_token, key_head), keys * key_token, exist, D, WIDTH)
    v = _load(_at(value, begin, kv_head, value_token, value_head), keys * value_token, exist, D, WIDTH)
    sums_k = tl.zeros([TILE, WIDTH], tl.float32)
    sums_v = tl.zeros([TILE, WIDTH], tl.float32)
    near_begin, near_end = tl.load(tile + 2), tl.load(tile + 3)
    far_begin, far_end = tl.load(tile + 4), tl.load(tile + 5)
    if window is not None:
        last = tl.minimum(end - 1 + window, far_end).to(tl.int32)
        far_end = tl.maximum(last, far_begin)
        near_end = tl.minimum(end - 1 + window, near_end).to(tl.int32)
    num_diagonal = tl.cdiv(tl.minimum(end, near_end) - near_begin, TOKENS)
    diagonal = near_begin, near_begin, near_begin * 0, num_diagonal
    num_far = tl.cdiv(far_end - far_begin, TOKENS)
    near_rest = near_begin + num_diagonal * TOKENS
    num_rest = tl.cdiv(tl.maximum(near_end - near_rest, 0), TOKENS)
    whole = far_begin, near_rest, num_far, num_far + num_rest
    for part_of_group in range((GROUP + HEADS - 1) // HEADS):
        unit = kv_head * ((GROUP + HEADS - 1) // HEADS) + part_of_group
        _, first_head, heads, is_head = _heads_of(unit, rows, GROUP, HEADS)
        for masked in tl.static_range(2):
            from_far, from_near, num_of_far, num_blocks = diagonal if masked else whole
            for index in range(num_blocks):
                start, stop = _block(index, num_of_far, from_far, far_end, from_near, near_end, TOKENS)
                inside = is_head & (tokens < stop - start)
                q = _at(query, start, first_head, query_token, query_head)
                q = _load(q, tokens * query_token + heads * query_head, inside, D, WIDTH)
                g = _at(grad_out, start, first_head, out_token, out_head)
                g = _load(g, tokens * out_token + heads * out_head, inside, D, WIDTH)
                offsets = tokens * num_heads + heads
                row_lse = _at(lse, start, first_head, num_heads, 1) + offsets
                # Rows that do not exist: P = exp2(-inf) = 0
                row_lse = tl.load(row_lse, mask=inside, other=float("inf"))[None, :] * _LOG2E
                row_delta = _at(delta, start, first_head, num_heads, 1) + offsets
                row_delta = tl.load(row_delta, mask=inside, other=0)[None, :]
                x, factor = _logits(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, softcap)
                if masked or window is not None:
                    x = _masked(x, (start - begin) + tokens[None, :] - keys[:, None], inside[None, :], window)
                grad_p = tl.dot(v, tl.trans(g), input_precision=PRECISION)
                p, grad = _grad_logits(x, factor, grad_p, row_lse, row_delta, softcap)
                sums_v = tl.dot(p.to(g.dtype), g, sums_v, input_precision=PRECISION)
                sums_k = tl.dot(grad.to(q.dtype), q, sums_k, input_precision=PRECISION)
    step = num_units * D
    if tl.load(tile + 6) > 1:
        place = _place(tile, begin)
        _store(_at(part_grad_key, place, kv_head, step, D), keys * step, exist, sums_k, D)
        _store(_at(part_grad_value, place, kv_head, step, D), keys * step, exist, sums_v, D)
    else:
        _store(_at(grad_key, begin, kv_head, step, D), keys * step, exist, sums_k * grad_scale, D)
        _store(_at(grad_value, begin, kv_head, step, D), keys * step, exist, sums_v, D)


class Sizes(NamedTuple):
    """Of a kernel's tiles: rows times query heads, keys, and threads, whatever a warp is."""

    rows: int
    keys: int
    threads: int


# As large as registers and the 99 KB of shared memory of small GPUs allow, the same for all lengths: of the forward
# pass, of the gradient of queries, and of that of keys and values.
_HALF_SIZES = {
    64: (Sizes(64, 64, 128), Sizes(64, 64, 128), Sizes(32, 64, 256)),
    128: (Sizes(128, 64, 256), Sizes(128, 32, 256), Sizes(32, 64, 256)),
    256: (Sizes(64, 32, 256), Sizes(64, 16, 256), Sizes(16, 32, 256)),
}
_FLOAT_SIZES = (Sizes(16, 16, 256),) * 3


class _Shape:
    """Compile-time arguments of the kernels for tensors of a kind."""

    def __init__(self, head_size: int, group: int, dtype: torch.dtype) -> None:
        sizes = _HALF_SIZES[triton.next_power_of_2(max(head_size, 64))]
        self.forward, self.grad_query, self.grad_key = _FLOAT_SIZES if dtype == torch.float32 else sizes
        self.heads = min(triton.next_power_of_2(group), 8)
        self.of_heads = {"D": head_size, "WIDTH": triton.next_power_of_2(max(head_size, 16))}
        self.of_group = {"GROUP": group, "HEADS": self.heads}

    def by_rows(self, sizes: Sizes) -> dict[str, Any]:
        return self.of_heads | self.of_group | {"TILE": self.tokens(sizes), "KEYS": sizes.keys, "PRECISION": PRECISION}

    def by_keys(self, sizes: Sizes) -> dict[str, Any]:
        tiles = {"TILE": sizes.keys, "TOKENS": self.tokens(sizes), "PRECISION": PRECISION}
        return self.of_heads | self.of_group | tiles

    def tokens(self, sizes: Sizes) -> int:
        """Of a tile of rows: more than 32, or 64 of one head, would mostly be masked on documents of 100."""
        return min(sizes.rows // self.heads, 32 if self.heads > 1 else 64)


class _Call:
    """What the kernels of a call have in common."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        list_offsets: torch.Tensor,
        causal: bool,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        self.num_tokens, self.num_heads, head_size = query.shape
        self.num_kv_heads, self.causal = key.shape[1], causal
        self.cu_seqlens, self.list_offsets = cu_seqlens, list_offsets
        self.inputs = (query, key, value)
        self.strides = [stride for tensor in self.inputs for stride in tensor.stride()[:2]]
        # Positions past a window of 2^31 - 1 are no int32; without a softcap one factor makes logits in base 2.
        window = None if window is None else min(window, self.num_tokens)
        self.options = (scale * LOG2E if softcap is None else scale / softcap, softcap, window)
        group = self.num_heads // self.num_kv_heads
        self.shape = _Shape(head_size, group, query.dtype)
        self.num_units = self.num_kv_heads * triton.cdiv(group, self.shape.heads)

    def plan(self, tile: int, by_keys: bool) -> tuple[torch.Tensor, int]:
        """The plan and how many of its places, the first, are for tiles in parts."""
        num_segments, num_lists = self.cu_seqlens.numel() - 1, self.list_offsets.numel() - 1
        in_parts = 0
        if not self.causal:
            in_parts = self.num_tokens // (SHARE * tile) + self.num_tokens // CHUNK + 2 * num_lists
        plan = self.cu_seqlens.new_zeros(in_parts + self.num_tokens // tile + num_segments, FIELDS)
        _plan_kernel[(num_segments,)](
            self.cu_seqlens, self.list_offsets, plan, self.num_tokens, num_segments, num_lists, in_parts, len(plan),
            BY_KEYS=by_keys, CAUSAL=self.causal, TILE=tile, CHUNK=CHUNK, SHARE=SHARE, BLOCK=BLOCK,
            enable_fp_fusion=True,
        )  # fmt: skip
        return plan, in_parts

    def parts(self, *shape: int) -> torch.Tensor:
        """For partial results, which causal lists do not have."""
        return self.inputs[0].new_empty(0 if self.causal else self.num_tokens // SHARE, *shape, dtype=torch.float32)

    def launch(self, kernel: Any, programs: int, sizes: Sizes, *arguments: Any, **constants: Any) -> None:
        warps = sizes.threads // (64 if torch.version.hip else 32)
        kernel[(programs,)](*arguments, num_warps=warps, num_stages=STAGES, enable_fp_fusion=True, **constants)

    def combine(
        self, in_parts: int, parts: torch.Tensor, part_lse: torch.Tensor | None, plan: torch.Tensor,
        sinks: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor | None, scale: float, tiles: dict[str, int],
    ) -> None:  # fmt: skip
        num_heads = out.shape[1]
        num_units = self.num_units if num_heads == self.num_heads else num_heads
        if in_parts:
            _combine_kernel[(in_parts * num_units,)](
                parts, part_lse, plan, sinks, out, lse, num_heads, num_units, scale,
                ROWS=ROWS, enable_fp_fusion=True, **self.shape.of_heads, **tiles,
            )  # fmt: skip


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    list_offsets: torch.Tensor,
    sinks: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [T, Hq, D] and lse [T, Hq]; last dimensions of the inputs are contiguous, sinks float32 and contiguous.

    Launched on the current device and stream; waits for nothing.
    """
    call = _Call(query, key, value, cu_seqlens, list_offsets, causal, scale, window, softcap)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    if query.numel():
        sizes = call.shape.forward
        constants = call.shape.by_rows(sizes)
        plan, in_parts = call.plan(constants["TILE"], by_keys=False)
        part_out, part_lse = call.parts(*query.shape[1:]), call.parts(call.num_heads)
        call.launch(
            _forward_kernel, len(plan) * call.num_units, sizes, *call.inputs, plan, sinks, out, lse, part_out, part_lse,
            call.num_heads, call.num_units, *call.strides, *call.options, **constants,
        )  # fmt: skip
        tiles = call.shape.of_group | {"TILE": constants["TILE"]}
        call.combine(in_parts, part_out, part_lse, plan, sinks, out, lse, 1.0, tiles)
    return out, lse


def block_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    list_offsets: torch.Tensor,
    sinks: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of query, key, value and sinks; out, lse, grad_lse are contiguous, all else as the forward has it."""
    call = _Call(query, key, value, cu_seqlens, list_offsets, causal, scale, window, softcap)
    grad_query, grad_key, grad_value = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in call.inputs
    )
    delta = torch.empty_like(lse)
    if query.numel():
        _delta_kernel[(triton.cdiv(delta.numel(), ROWS),)](
            grad_out, out, grad_lse, delta, delta.numel(), call.num_heads, *grad_out.stride()[:2],
            ROWS=ROWS, enable_fp_fusion=True, **call.shape.of_heads,
        )  # fmt: skip
        given = (*call.inputs, grad_out, lse, delta)
        rest = (*call.strides, *grad_out.stride()[:2], *call.options, scale)
        sizes = call.shape.grad_query
        constants = call.shape.by_rows(sizes)
        plan, in_parts = call.plan(constants["TILE"], by_keys=False)
        parts = call.parts(*query.shape[1:])
        call.launch(
            _grad_query_kernel, len(plan) * call.num_units, sizes, *given, plan, grad_query, parts, call.num_heads,
            call.num_units, *rest, **constants,
        )  # fmt: skip
        tiles = call.shape.of_group | {"TILE": constants["TILE"]}
        call.combine(in_parts, parts, None, plan, None, grad_query, None, scale, tiles)

        sizes = call.shape.grad_key
        plan, in_parts = call.plan(sizes.keys, by_keys=True)
        key_parts, value_parts = call.parts(*key.shape[1:]), call.parts(*key.shape[1:])
        call.launch(
            _grad_key_kernel, len(plan) * call.num_kv_heads, sizes, *given, plan, grad_key, grad_value, key_parts,
            value_parts, call.num_heads, call.num_kv_heads, *rest, **call.shape.by_keys(sizes),
        )  # fmt: skip
        tiles = {"GROUP": 1, "HEADS": 1, "TILE": sizes.keys}
        call.combine(in_parts, key_parts, None, plan, None, grad_key, None, scale, tiles)
        call.combine(in_parts, value_parts, None, plan, None, grad_value, None, 1.0, tiles)
    grad_sinks = None if sinks is None else -(torch.exp(sinks - lse) * delta).sum(dim=0)
    return grad_query, grad_key, grad_value, grad_sinks


_NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_INTEGERS = dict.fromkeys(("cu_seqlens", "list_offsets", "plan"), "*i32")
_FLOATS = dict.fromkeys(
    ("sinks", "lse", "delta", "grad_lse", "part_out", "part_lse", "part_grad", "part_grad_key", "part_grad_value"),
    "*fp32",
) | dict.fromkeys(("scale", "softcap", "grad_scale"), "fp32")
_TENSORS = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")
_PLAIN = dict.fromkeys(("sinks", "softcap", "window"))


def _case(kernel: Any, constants: dict[str, Any], dtype: torch.dtype, threads: int = 128) -> CompileCase:
    types = _INTEGERS | _FLOATS | dict.fromkeys(_TENSORS, _NAMES[dtype])
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    strides = [name for name in kernel.arg_names if name.endswith(("_token", "_head"))]
    aligned = (*strides, *(name for name, type_name in signature.items() if type_name.startswith("*")))
    return CompileCase(kernel, signature, constants, threads // 32, STAGES, aligned, same_threads=True)


def _cases(head_size: int, group: int, dtype: torch.dtype, without: dict[str, None]) -> list[CompileCase]:
    """Of the kernels that a call with these inputs launches."""
    shape = _Shape(head_size, group, dtype)
    return [
        _case(_forward_kernel, without | shape.by_rows(shape.forward), dtype, shape.forward.threads),
        _case(_grad_query_kernel, without | shape.by_rows(shape.grad_query), dtype, shape.grad_query.threads),
        _case(_grad_key_kernel, without | shape.by_keys(shape.grad_key), dtype, shape.grad_key.threads),
    ]


_TILES = {"TILE": 32, "CHUNK": CHUNK, "SHARE": SHARE, "BLOCK": BLOCK}
_ROWS = {"D": 128, "WIDTH": 128, "GROUP": 4, "HEADS": 4, "TILE": 32, "ROWS": ROWS}
_SUMS = dict.fromkeys(("part_lse", "lse", "sinks"))
COMPILE_CASES = (
    *(
        _case(_plan_kernel, _TILES | {"BY_KEYS": by_keys, "CAUSAL": causal}, torch.float32)
        for by_keys in (False, True)
        for causal in (False, True)
    ),
    _case(_combine_kernel, _ROWS, torch.bfloat16),
    _case(_combine_kernel, _ROWS | _SUMS, torch.float32),
    _case(_delta_kernel, _ROWS, torch.bfloat16),
    *(
        case
        for head_size, group, dtype, without in (
            (64, 1, torch.bfloat16, _PLAIN),
            (128, 4, torch.bfloat16, _PLAIN),
            (128, 2, torch.float16, {}),
            (256, 2, torch.bfloat16, _PLAIN),
            (64, 8, torch.float32, _PLAIN),
            (80, 4, torch.float32, _PLAIN),
            (256, 1, torch.float32, _PLAIN),
        )
        for case in _cases(head_size, group, dtype, without)
    ),
)
