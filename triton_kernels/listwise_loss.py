# ruff: noqa: N803  compile-time arguments are in capitals, as is usual with Triton
"""Listwise losses and their gradients; python/rankernel/reference/listwise_loss.py has the formulas.

Lists lie in one flat array, and the host never learns how long they are: nothing here waits for the device. Kernels
that look at all pairs of a list run one program for ROWS of its items, with all items as columns (:func:`tile_of` says
which program gets which); the others run one program a list. Both walk a list in steps from its first item on, so that
its bits do not depend on the batch around it. Every element is written by one program: no atomics.

A call runs :func:`_survey_kernel`, which says which lists count; the kind's own kernels, which write the gradient of
every list's own loss; then the reduction over lists, in PyTorch. Where a kind wants ranks they are counted or sorted.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rankernel.listwise import KINDS, Settings

from ._common import CompileCase, bounds, tile_of

ROWS, COLUMNS = 16, 32  # of a tile of pairs
BLOCK = 512  # items of a list that one step takes
COUNTING_LIMIT = 16384  # items up to which counting better ones, n^2 comparisons in one kernel, replaces sorts
BISECTIONS = 40  # to float32 resolution

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # exp(_LOWEST - anything) is 0, and never NaN as with -inf
_TINY = tl.constexpr(2.0**-100)  # least sum that Sinkhorn divides by
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _are_valid(where, items, inside):
    if where is not None:
        inside = inside & (tl.load(where + items, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _sigmoids(x):
    """sigmoid(x), sigmoid(-x) and softplus(x)"""
    e = tl.exp(-tl.abs(x))
    u = 1 + e
    large, small = 1 / u, e / u
    # log(1 + e), with what the rounding of 1 + e lost.
    softplus = tl.maximum(x, 0) + tl.log(u) + (e - (u - 1)) / u
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large), softplus


@triton.jit
def _add_exp(peak, total, other_peak, other_total):
    """exp(peak) total + exp(other_peak) other_total, in the same form"""
    top = tl.maximum(peak, other_peak)
    return top, total * tl.exp(peak - top) + other_total * tl.exp(other_peak - top)


@triton.jit
def _add_block(peak, total, x, chosen):
    """Adds exp(x) of the chosen to exp(peak) total."""
    top = tl.max(tl.where(chosen, x, _LOWEST), axis=0)
    return _add_exp(peak, total, top, tl.sum(tl.where(chosen, tl.exp(tl.where(chosen, x - top, 0)), 0), axis=0))


@triton.jit
def _gains(y):
    return tl.exp2(tl.maximum(y, 0.0)) - 1


@triton.jit(do_not_specialize=["num_items", "num_lists"])
def _rank_kernel(
    keys, ties, offsets, where, ranks, order, num_items, num_lists,
    SHARED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Ranks by counting better items: the higher key, among equals the lower tie, then the lower index, comes first.

    ranks: [S, n] by item, from 1. order: [S, n], a list's valid items from its begin on. With SHARED, equals share the
    best rank among them, and there is no order.
    """
    sample = tl.program_id(1).to(tl.int64) * num_items
    _, begin, end, start = tile_of(offsets, num_items, num_lists, ROWS)
    if (start < begin) | (start >= end):
        return
    rows = start + tl.arange(0, ROWS)
    valid = _are_valid(where, rows, rows < end)
    key = tl.load(keys + sample + rows, mask=valid, other=0)
    if ties is not None:
        tie = tl.load(ties + rows, mask=valid, other=0)
    better = tl.zeros([ROWS, COLUMNS], tl.int32)
    for first in range(begin, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        present = _are_valid(where, columns, columns < end)
        other = tl.load(keys + sample + columns, mask=present, other=0)
        ahead = other[None, :] > key[:, None]
        if not SHARED:
            before = columns[None, :] < rows[:, None]
            if ties is not None:
                other_tie = tl.load(ties + columns, mask=present, other=0)
                equal = other_tie[None, :] == tie[:, None]
                before = (other_tie[None, :] < tie[:, None]) | (equal & before)
            ahead = ahead | ((other[None, :] == key[:, None]) & before)
        better += (ahead & present[None, :]).to(tl.int32)
    rank = tl.sum(better, axis=1)
    tl.store(ranks + sample + rows, rank + 1, mask=valid)
    if not SHARED:
        tl.store(order + sample + begin + rank, rows, mask=valid)


@triton.jit(do_not_specialize=["num_items", "seed"])
def _draw_kernel(scores, offsets, where, draws, num_items, seed, GUMBEL: tl.constexpr, BLOCK: tl.constexpr):
    """Philox for the valid items of a list, [S, n]: the integers, or scores plus Gumbel noise made of them."""
    number, sample = tl.program_id(0), tl.program_id(1)
    begin, end = bounds(offsets, number, num_items)
    drawn = 0
    for first in range(begin, end, BLOCK):
        items = first + tl.arange(0, BLOCK)
        valid = _are_valid(where, items, items < end)
        index = drawn + tl.cumsum(valid.to(tl.int32), axis=0) - 1
        zero = index * 0
        word, _, _, _ = tl.philox(seed.to(tl.uint64) + number, index, zero + sample, zero, zero)
        out = draws + sample.to(tl.int64) * num_items + items
        if GUMBEL:
            uniform = (word.to(tl.float64) + 0.5) / 4294967296.0
            s = tl.load(scores + items, mask=valid, other=0).to(tl.float64)
            tl.store(out, s - tl.log(-tl.log(uniform)), mask=valid)
        else:
            tl.store(out, word.to(tl.int64), mask=valid)
        drawn += tl.sum(valid.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["num_items", "k"])
def _survey_kernel(
    labels, order, offsets, where, counts, norms, num_items, k,
    NEEDS: tl.constexpr, DISTILLATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts: valid items of every list, 0 for a list without a loss. norms: what the kind divides by, or 1."""
    number = tl.program_id(0)
    begin, end = bounds(offsets, number, num_items)
    count, norm = tl.zeros([], tl.int32), tl.zeros([], tl.float32)
    lowest, highest = tl.full([], float("inf"), tl.float32), tl.full([], float("-inf"), tl.float32)
    for first in range(begin, end, BLOCK):
        items = first + tl.arange(0, BLOCK)
        valid = _are_valid(where, items, items < end)
        y = tl.load(labels + items, mask=valid, other=0)
        count += tl.sum(valid.to(tl.int32), axis=0)
        lowest = tl.minimum(lowest, tl.min(tl.where(valid, y, float("inf")), axis=0))
        highest = tl.maximum(highest, tl.max(tl.where(valid, y, float("-inf")), axis=0))
        if NEEDS == "label_sum":
            norm += tl.sum(y, axis=0)
        elif NEEDS == "positive_sum":
            norm += tl.sum(tl.maximum(y, 0.0), axis=0)
        elif (NEEDS == "positives") | (NEEDS == "both_signs") | (NEEDS == "more_than_k"):
            norm += tl.sum((y > 0).to(tl.float32), axis=0)
        elif NEEDS == "relevant":
            norm += tl.sum((valid & (y >= 1)).to(tl.float32), axis=0)
    counted = count > 1
    if not DISTILLATION:
        counted = counted & (lowest < highest)
    if (NEEDS == "ideal") | (NEEDS == "ideal_or_one"):
        best = tl.where(counted, tl.minimum(count, k), 0)
        for first in range(0, best, BLOCK):
            rank = first + tl.arange(0, BLOCK)
            ranked = rank < best
            items = tl.load(order + begin + rank, mask=ranked, other=0)
            gains = _gains(tl.load(labels + items, mask=ranked, other=0))
            norm += tl.sum(gains / tl.log2(2.0 + rank), axis=0)
    if (NEEDS == "one") | (NEEDS == "ideal_or_one"):
        norm = tl.where(norm > 0, norm, 1.0)
    elif NEEDS == "label_sum":
        counted = counted & (norm != 0)
    else:
        counted = counted & (norm > 0)
        if NEEDS == "both_signs":
            counted = counted & (norm < count)
        elif NEEDS == "more_than_k":
            counted = counted & (count > k)
    tl.store(counts + number, tl.where(counted, count, 0))
    tl.store(norms + number, norm)


@triton.jit
def _discounts(rank, k, KIND: tl.constexpr):
    if KIND == "lipo":
        return 1 / tl.log(1.0 + rank)
    discount = 1 / tl.log2(1.0 + rank)
    if KIND == "dcg_lambda":
        discount = tl.where(rank <= k, discount, 0)
    return discount


@triton.jit
def _levels(y, norm, KIND: tl.constexpr):
    if KIND == "lipo":
        return tl.exp2(y)
    return _gains(y) / norm


@triton.jit(do_not_specialize=["num_items", "num_lists", "k"])
def _pair_kernel(
    scores, labels, ranks, offsets, where, counts, norms, grad, row_losses, row_pairs, num_items, num_lists,
    sigma, mu, margin, k, KIND: tl.constexpr, EITHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sum_j weight_ij softplus(margin - sigma (s_i - s_j)) for every item i, its number of pairs, and its gradient."""
    number, begin, end, start = tile_of(offsets, num_items, num_lists, ROWS)
    count = tl.load(counts + number)
    if (start < begin) | (start >= end) | (count == 0):
        return
    norm = tl.load(norms + number)
    rows = start + tl.arange(0, ROWS)
    valid = _are_valid(where, rows, rows < end)
    s_i = tl.load(scores + rows, mask=valid, other=0)[:, None]
    y_i = tl.load(labels + rows, mask=valid, other=0)[:, None]
    if ranks is not None:
        r_i = tl.load(ranks + rows, mask=valid, other=1)[:, None]
        if (KIND != "weighted_ranknet") & (KIND != "skip_ranknet"):
            g_i, d_i = _levels(y_i, norm, KIND), _discounts(r_i, k, KIND)
    slope = tl.zeros([ROWS, COLUMNS], tl.float32)
    loss = tl.zeros([ROWS, COLUMNS], tl.float32)
    pairs = tl.zeros([ROWS, COLUMNS], tl.int32)
    for first in range(begin, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        present = _are_valid(where, columns, columns < end)
        s_j = tl.load(scores + columns, mask=present, other=0)[None, :]
        y_j = tl.load(labels + columns, mask=present, other=0)[None, :]
        counted = valid[:, None] & present[None, :]
        weight = tl.full([ROWS, COLUMNS], 1.0, tl.float32)
        if ranks is not None:
            r_j = tl.load(ranks + columns, mask=present, other=1)[None, :]
            apart = tl.abs(r_i - r_j)
            if KIND == "weighted_ranknet":
                weight = 1.0 / (r_i + r_j)
            elif KIND == "skip_ranknet":
                counted = counted & ((apart & (apart - 1)) == 0)
            else:
                g_j, d_j = _levels(y_j, norm, KIND), _discounts(r_j, k, KIND)
                absolute = tl.abs(d_i - d_j)
                if (KIND == "ndcg_loss2") | (KIND == "ndcg_loss2pp") | (KIND == "dcg2_lambda"):
                    distance = tl.maximum(apart, 1)
                    relative = tl.where(apart > 0, 1 / tl.log2(1.0 + distance) - 1 / tl.log2(2.0 + distance), 0)
                if (KIND == "lambdarank") | (KIND == "lipo"):
                    weight = absolute
                elif KIND == "ndcg_loss2":
                    weight = relative
                elif KIND == "ndcg_loss2pp":
                    weight = mu * relative + absolute
                elif KIND == "dcg_lambda":
                    weight = count * absolute
                elif KIND == "dcg2_lambda":
                    worse = tl.maximum(r_i, r_j)
                    # Both at rank 1 is no pair; the maximum keeps the division finite there.
                    outside = 1 / (1 - 1 / tl.log2(1.0 + tl.maximum(worse, 2)))
                    weight = count * relative * tl.where(worse > k, outside, 1.0)
                if KIND != "ndcg_loss1":
                    weight *= tl.abs(g_i - g_j)
                if (KIND != "lipo") & (KIND != "dcg_lambda") & (KIND != "dcg2_lambda"):
                    inside = (r_i <= k) | (r_j <= k) if EITHER else (r_i <= k) & (r_j <= k)
                    counted = counted & inside
        if (KIND == "soft_ranknet") | (KIND == "ndcg_loss1"):  # both directions of a pair have a weight
            if KIND == "soft_ranknet":
                counted = counted & (rows[:, None] != columns[None, :])
                forward, backward, _ = _sigmoids(y_i - y_j)
            else:
                forward, backward = g_i * d_i, g_j * d_j
            pull, opposite, softplus = _sigmoids(sigma * (s_j - s_i))
            slope += tl.where(counted, backward * opposite - forward * pull, 0)
            loss += tl.where(counted, forward * softplus, 0)
            pairs += counted.to(tl.int32)
        else:
            better, worse = counted & (y_i > y_j), counted & (y_i < y_j)
            pull, _, softplus = _sigmoids(margin + sigma * tl.where(worse, s_i - s_j, s_j - s_i))
            slope += tl.where(worse, weight * pull, 0) - tl.where(better, weight * pull, 0)
            loss += tl.where(better, weight * softplus, 0)
            pairs += better.to(tl.int32)
    tl.store(grad + rows, sigma * tl.sum(slope, axis=1), mask=valid)
    tl.store(row_losses + rows, tl.sum(loss, axis=1), mask=valid)
    tl.store(row_pairs + rows, tl.sum(pairs, axis=1), mask=valid)


@triton.jit(do_not_specialize=["num_items"])
def _pair_total_kernel(
    row_losses, row_pairs, offsets, where, counts, grad, losses, pairs, num_items, unit,
    KIND: tl.constexpr, DIVISOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the rows of every list, and divides its loss and gradient by its pairs or items."""
    number = tl.program_id(0)
    count = tl.load(counts + number)
    if count == 0:
        return
    begin, end = bounds(offsets, number, num_items)
    loss, pair_count = tl.zeros([], tl.float32), tl.zeros([], tl.int64)
    for first in range(begin, end, BLOCK):
        items = first + tl.arange(0, BLOCK)
        valid = _are_valid(where, items, items < end)
        loss += tl.sum(tl.load(row_losses + items, mask=valid, other=0), axis=0)
        pair_count += tl.sum(tl.load(row_pairs + items, mask=valid, other=0).to(tl.int64), axis=0)
    if KIND == "soft_ranknet":  # a pair is counted once, with both its directions
        pair_count = pair_count // 2
    scale = unit
    if DIVISOR == 1:
        scale = unit / tl.maximum(pair_count, 1).to(tl.float32)
    elif DIVISOR == 2:
        scale = unit / count
    tl.store(losses + number, scale * loss)
    tl.store(pairs + number, pair_count)
    for first in range(begin, end, BLOCK):
        items = first + tl.arange(0, BLOCK)
        valid = _are_valid(where, items, items < end)
        tl.store(grad + items, scale * tl.load(grad + items, mask=valid, other=0), mask=valid)


@triton.jit(do_not_specialize=["num_items"])
def _softmax_kernel(
    scores, labels, offsets, where, counts, norms, grad, losses, num_items, temperature,
    KIND: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cross entropies of softmax(scores / temperature), one program a list.

    Those quotients are rounded to nearest: the exponential of one that is 2 ulp off has an error as large as it is.
    """
    number = tl.program_id(0)
    if tl.load(counts + number) == 0:
        return
    begin, end = bounds(offsets, number, num_items)
    norm = tl.load(norms + number)
    teacher_temperature = temperature if KIND == "kl_distillation" else 1.0
    # exp(peak) total is the sum over all items, or over the negatives where they are decoupled; the target is the
    # softmax of the labels, or of the scores of the positives.
    peak, total = tl.full([], _LOWEST, tl.float32), tl.zeros([], tl.float32)
    target_peak, target_total = tl.full([], _LOWEST, tl.float32), tl.zeros([], tl.float32)
    for first in range(begin, end, BLOCK):
        items = first + tl.arange(0, BLOCK)
        valid = _are_valid(where, items, items < end)
        x = tl.div_rn(tl.load(scores + items, mask=valid, other=0), temperature)
        y = tl.load(labels + items, mask=valid, other=0)
        if KIND == "decoupled_softmax":
            peak, total = _add_block(peak, total, x, valid & (y <= 0))
        else:
            peak, total = _add_block(peak, total, x, valid)
        if KIND == "infonce":
            target_peak, target_total = _add_block(target_peak, target_total, x, valid & (y > 0))
        elif (KIND == "listnet") | (KIND == "kl_distillation"):
            target_peak, target_total = _add_block(target_peak, target_total, tl.div_rn(y, teacher_temperature), valid)
    log_total = tl.log(total)
    loss, pull = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    if KIND == "infonce":
        loss = (peak - target_peak) + tl.log(total / target_total)
    if KIND == "decoupled_softmax":
        for first in range(begin, end, BLOCK):
            items = first + tl.arange(0, BLOCK)
            valid = _are_valid(where, items, items < end)
            x = tl.div_rn(tl.load(scores + items, mask=valid, other=0), temperature)
            positive = valid & (tl.load(labels + items, mask=valid, other=0) > 0)
            share, _, softplus = _sigmoids(peak - x + log_total)
            pull += tl.sum(tl.where(positive, share, 0), axis=0) / norm
            loss += tl.sum(tl.where(positive, softplus, 0), axis=0) / norm
    for first in range(begin, end, BLOCK):
        items = first + tl.arange(0, BLOCK)
        valid = _are_valid(where, items, items < end)
        x = tl.div_rn(tl.load(scores + items, mask=valid, other=0), temperature)
        y = tl.load(labels + items, mask=valid, other=0)
        below = tl.where(valid, x - peak, 0)
        if KIND == "decoupled_softmax":
            share, _, _ = _sigmoids(log_total - below)
            negative = tl.exp(tl.where(y > 0, 0, below)) / total * pull
            slope = tl.where(y > 0, -share / norm, negative) / temperature
        else:
            probability = tl.exp(below) / total
            if KIND == "softmax":
                target = y / norm if NORMALIZE else y
                probability *= 1.0 if NORMALIZE else norm
                losses_of_items = target * (log_total - below)
            elif KIND == "infonce":
                target = tl.where(y > 0, tl.exp(tl.where(y > 0, x - target_peak, 0)) / target_total, 0)
                losses_of_items = tl.zeros([BLOCK], tl.float32)
            else:
                target_below = tl.div_rn(y, teacher_temperature) - target_peak
                target = tl.exp(target_below) / target_total
                losses_of_items = target * (log_total - below)
                if KIND == "kl_distillation":
                    losses_of_items += target * (target_below - tl.log(target_total))
            loss += tl.sum(tl.where(valid, losses_of_items, 0), axis=0)
            slope = (probability - target) / temperature
        if KIND == "kl_distillation":
            slope *= temperature * temperature
        tl.store(grad + items, slope, mask=valid)
    if KIND == "kl_distillation":
        loss *= temperature * temperature
    tl.store(losses + number, loss)


@triton.jit(do_not_specialize=["num_items"])
def _margin_mse_kernel(
    scores, labels, offsets, where, counts, grad, losses, num_items, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean of ((s_0 - s_i) - (y_0 - y_i))^2, one program a list."""
    number = tl.program_id(0)
    count = tl.load(counts + number)
    if count == 0:
        return
    begin, end = bounds(offsets, number, num_items)
    positive = end
    for first in range(begin, end, BLOCK):
        items = first + tl.arange(0, BLOCK)
        valid = _are_valid(where, items, items < end)
        positive = tl.minimum(positive, tl.min(tl.where(valid, items, end), axis=0))
    s_0, y_0 = tl.load(scores + positive), tl.load(labels + positive)
    loss, slope = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    for first in range(begin, end, BLOCK):
        items = first + tl.arange(0, BLOCK)
        valid = _are_valid(where, items, items < end)
        s = tl.load(scores + items, mask=valid, other=0)
        y = tl.load(labels + items, mask=valid, other=0)
        error = tl.where(valid, (s_0 - s) - (y_0 - y), 0)
        loss += tl.sum(error * error, axis=0)
        slope += tl.sum(error, axis=0)
        tl.store(grad + items, -2 * error / (count - 1), mask=valid & (items != positive))
    tl.store(grad + positive, 2 * slope / (count - 1))
    tl.store(losses + number, loss / (count - 1))


@triton.jit
def _rank_weights(rank, count, k, KIND: tl.constexpr, NORMALIZE: tl.constexpr):
    """Weights of the Plackett-Luce factors; rank from 1."""
    if KIND == "p_listmle":
        n, r = count.to(tl.float32), rank.to(tl.float32)
        if NORMALIZE:
            last = tl.exp2(-n)
            return (tl.exp2(-r) - last) / (1 - (n + 1) * last)
        return tl.exp2(n - r) - 1
    return tl.where(rank <= k, 1.0, 0.0)


@triton.jit(do_not_specialize=["num_items", "k"])
def _remaining_kernel(
    scores, labels, order, offsets, counts, norms, peaks, totals, losses, rewards, num_items, k,
    KIND: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """exp(peak) total = sum of exp(scores) from each rank of an order on, [S, n]; the loss made of them, [S, B].

    For pg_rank also the reward of the order, its nDCG; its k cuts that and not the loss.
    """
    number, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = tl.load(counts + number)
    if count == 0:
        return
    begin, _ = bounds(offsets, number, num_items)
    places = sample * num_items + begin
    peak, total = tl.full([], _LOWEST, tl.float32), tl.zeros([], tl.float32)
    loss, dcg = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    blocks = tl.cdiv(count, BLOCK)
    for block in range(0, blocks):
        lanes = tl.arange(0, BLOCK)
        rank = (blocks - 1 - block) * BLOCK + lanes
        ranked = rank < count
        items = tl.load(order + places + rank, mask=ranked, other=0)
        s = tl.load(scores + items, mask=ranked, other=0)
        tops, sums = tl.associative_scan(
            (tl.where(ranked, s, _LOWEST), tl.where(ranked, 1.0, 0.0)), 0, _add_exp, reverse=True
        )
        tops, sums = _add_exp(tops, sums, peak, total)
        tl.store(peaks + places + rank, tops, mask=ranked)
        tl.store(totals + places + rank, sums, mask=ranked)
        cut = count if KIND == "pg_rank" else k
        weights = _rank_weights(rank + 1, count, cut, KIND, NORMALIZE)
        loss += tl.sum(tl.where(ranked, weights * (tops - s + tl.log(tl.where(ranked, sums, 1.0))), 0), axis=0)
        if KIND == "pg_rank":
            gains = _gains(tl.load(labels + items, mask=ranked, other=0))
            dcg += tl.sum(tl.where(rank < k, gains / tl.log2(2.0 + rank), 0), axis=0)
        peak = tl.max(tops, axis=0)
        total = tl.sum(tl.where(lanes == 0, sums, 0), axis=0)
    out = sample * tl.num_programs(0) + number
    tl.store(losses + out, loss)
    if KIND == "pg_rank":
        tl.store(rewards + out, dcg / tl.load(norms + number))


@triton.jit(do_not_specialize=["num_items", "k"])
def _plackett_luce_kernel(
    scores, order, offsets, counts, peaks, totals, slopes, num_items, k,
    KIND: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """exp(s_i) sum of weight / (exp(peak) total) up to rank i, less the weight of i, [S, n].

    The sums up to a rank are scanned as exp(-peak) times a number. Peaks fall, so the largest -peak is the last one,
    and no exponential here is above 1.
    """
    number, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = tl.load(counts + number)
    if count == 0:
        return
    begin, _ = bounds(offsets, number, num_items)
    places = sample * num_items + begin
    before_peak, before = tl.full([], _LOWEST, tl.float32), tl.zeros([], tl.float32)
    for first in range(0, count, BLOCK):
        rank = first + tl.arange(0, BLOCK)
        ranked = rank < count
        items = tl.load(order + places + rank, mask=ranked, other=0)
        s = tl.load(scores + items, mask=ranked, other=0)
        peak = tl.load(peaks + places + rank, mask=ranked, other=0)
        total = tl.load(totals + places + rank, mask=ranked, other=1)
        cut = count if KIND == "pg_rank" else k
        weights = _rank_weights(rank + 1, count, cut, KIND, NORMALIZE)
        tops, sums = tl.associative_scan(
            (tl.where(ranked, -peak, _LOWEST), tl.where(ranked, weights / total, 0)), 0, _add_exp
        )
        tops, sums = _add_exp(before_peak, before, tops, sums)
        slope = tl.exp(tl.where(ranked, s + tops, 0)) * sums - weights
        tl.store(slopes + sample * num_items + items, slope, mask=ranked)
        before_peak = tl.max(tops, axis=0)
        before = tl.sum(tl.where(rank == first + BLOCK - 1, sums, 0), axis=0)


@triton.jit(do_not_specialize=["num_items"])
def _policy_kernel(
    sample_losses, rewards, slopes, offsets, where, counts, grad, losses, num_items, num_samples,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """1/S sum over the samples of (reward - mean of the other rewards) times loss and gradient."""
    number, num_lists = tl.program_id(0), tl.num_programs(0)
    if tl.load(counts + number) == 0:
        return
    # Differences from the first reward: the advantages of equal rewards are exactly 0.
    first_reward = tl.load(rewards + number)
    mean, loss = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    for sample in range(0, num_samples):
        mean += (tl.load(rewards + sample * num_lists + number) - first_reward) / num_samples
    for sample in range(0, num_samples):
        gain = tl.load(rewards + sample * num_lists + number) - first_reward
        loss += (gain - mean) / (num_samples - 1) * tl.load(sample_losses + sample * num_lists + number)
    tl.store(losses + number, loss)
    begin, end = bounds(offsets, number, num_items)
    for first in range(begin, end, BLOCK):
        items = first + tl.arange(0, BLOCK)
        valid = _are_valid(where, items, items < end)
        slope = tl.zeros([BLOCK], tl.float32)
        sample_slopes = slopes + items
        for sample in range(0, num_samples):
            gain = tl.load(rewards + sample * num_lists + number) - first_reward
            slope += (gain - mean) / (num_samples - 1) * tl.load(sample_slopes, mask=valid, other=0)
            sample_slopes += num_items
        tl.store(grad + items, slope, mask=valid)


@triton.jit(do_not_specialize=["num_items", "num_lists"])
def _smooth_rank_kernel(
    scores, offsets, where, counts, smooth_ranks, num_items, num_lists, temperature,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """R_i = 1/2 + sum_j sigmoid((s_j - s_i) / temperature), j = i included."""
    number, begin, end, start = tile_of(offsets, num_items, num_lists, ROWS)
    if (start < begin) | (start >= end) | (tl.load(counts + number) == 0):
        return
    rows = start + tl.arange(0, ROWS)
    valid = _are_valid(where, rows, rows < end)
    s_i = tl.load(scores + rows, mask=valid, other=0)[:, None]
    above = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(begin, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        present = _are_valid(where, columns, columns < end)
        s_j = tl.load(scores + columns, mask=present, other=0)[None, :]
        share, _, _ = _sigmoids((s_j - s_i) / temperature)
        above += tl.where(present[None, :], share, 0)
    tl.store(smooth_ranks + rows, 0.5 + tl.sum(above, axis=1), mask=valid)


@triton.jit(do_not_specialize=["num_items"])
def _smooth_loss_kernel(
    scores, labels, smooth_ranks, offsets, where, counts, norms, pulls, losses, num_items,
    KIND: tl.constexpr, AVERAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss made of smooth ranks, and pulls: its derivatives with respect to them."""
    number = tl.program_id(0)
    if tl.load(counts + number) == 0:
        return
    begin, end = bounds(offsets, number, num_items)
    norm = tl.load(norms + number)
    best_score, best = tl.full([], float("-inf"), tl.float32), end
    if (KIND == "approx_mrr") & (not AVERAGE):
        for first in range(begin, end, BLOCK):
            items = first + tl.arange(0, BLOCK)
            valid = _are_valid(where, items, items < end)
            relevant = valid & (tl.load(labels + items, mask=valid, other=0) >= 1)
            score = tl.where(relevant, tl.load(scores + items, mask=valid, other=0), float("-inf"))
            highest = tl.max(score, axis=0)
            if highest > best_score:
                best_score, best = highest, tl.min(tl.where(score == highest, items, end), axis=0)
    loss = tl.zeros([], tl.float32)
    for first in range(begin, end, BLOCK):
        items = first + tl.arange(0, BLOCK)
        valid = _are_valid(where, items, items < end)
        y = tl.load(labels + items, mask=valid, other=0)
        rank = tl.load(smooth_ranks + items, mask=valid, other=1)
        if KIND == "approx_ndcg":
            weight, log_rank = _gains(y) / norm, tl.log2(1 + rank)
            value = weight / log_rank
            pull = value / (log_rank * (1 + rank) * _LN2)
        else:
            weight = tl.maximum(y, 0.0) / norm if AVERAGE else tl.where(items == best, 1.0, 0.0)
            value = weight / rank
            pull = value / rank
        loss -= tl.sum(tl.where(valid, value, 0), axis=0)
        tl.store(pulls + items, pull, mask=valid)
    tl.store(losses + number, loss)


@triton.jit(do_not_specialize=["num_items", "num_lists"])
def _smooth_grad_kernel(
    scores, pulls, offsets, where, counts, grad, num_items, num_lists, temperature,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_i = sum_j (pull_j - pull_i) sigmoid'((s_i - s_j) / temperature) / temperature"""
    number, begin, end, start = tile_of(offsets, num_items, num_lists, ROWS)
    if (start < begin) | (start >= end) | (tl.load(counts + number) == 0):
        return
    rows = start + tl.arange(0, ROWS)
    valid = _are_valid(where, rows, rows < end)
    s_i = tl.load(scores + rows, mask=valid, other=0)[:, None]
    pull_i = tl.load(pulls + rows, mask=valid, other=0)[:, None]
    slope = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(begin, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        present = _are_valid(where, columns, columns < end)
        s_j = tl.load(scores + columns, mask=present, other=0)[None, :]
        pull_j = tl.load(pulls + columns, mask=present, other=0)[None, :]
        share, rest, _ = _sigmoids((s_i - s_j) / temperature)
        slope += tl.where(present[None, :], (pull_j - pull_i) * share * rest, 0)
    tl.store(grad + rows, tl.sum(slope, axis=1) / temperature, mask=valid)


@triton.jit
def _soft_topk_values(scores, items, valid, sigma, shift, nearest):
    """1 - z, -log z, and z (1 - z) in units of its largest"""
    u = sigma * (tl.load(scores + items, mask=valid, other=0) + shift)
    rest, _, minus_log_z = _sigmoids(-u)
    e = tl.exp(-tl.abs(u))
    return rest, minus_log_z, tl.exp(nearest - tl.abs(u)) / ((1 + e) * (1 + e))


@triton.jit(do_not_specialize=["num_items", "k"])
def _soft_topk_kernel(
    scores, labels, offsets, where, counts, norms, grad, losses, num_items, k, sigma,
    BISECTIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """-mean over the positives of log z, z = sigmoid(sigma (s + t)), sum z = k by bisection; one program a list."""
    number = tl.program_id(0)
    if tl.load(counts + number) == 0:
        return
    begin, end = bounds(offsets, number, num_items)
    lowest, highest = tl.full([], float("inf"), tl.float32), tl.full([], float("-inf"), tl.float32)
    for first in range(begin, end, BLOCK):
        items = first + tl.arange(0, BLOCK)
        valid = _are_valid(where, items, items < end)
        s = tl.load(scores + items, mask=valid, other=0)
        lowest = tl.minimum(lowest, tl.min(tl.where(valid, s, float("inf")), axis=0))
        highest = tl.maximum(highest, tl.max(tl.where(valid, s, float("-inf")), axis=0))
    margin = (10 + tl.log((end - begin).to(tl.float32))) / sigma
    low, high = -highest - margin, -lowest + margin
    for _bisection in range(BISECTIONS):
        # sum z - k = #(u >= 0) - k + what the items of either side are short of 0 or 1. Where the count is k, that is
        # in units of the largest such part, so that a wide gap between the best k and the rest has its middle found.
        middle = (low + high) / 2
        count, nearest = tl.zeros([], tl.float32), tl.full([], float("inf"), tl.float32)
        for first in range(begin, end, BLOCK):
            items = first + tl.arange(0, BLOCK)
            valid = _are_valid(where, items, items < end)
            u = sigma * (tl.load(scores + items, mask=valid, other=0) + middle)
            count += tl.sum(tl.where(valid & (u >= 0), 1.0, 0.0), axis=0)
            nearest = tl.minimum(nearest, tl.min(tl.where(valid, tl.abs(u), float("inf")), axis=0))
        unit = tl.where(count == k, nearest, 0.0)
        excess = count - k
        for first in range(begin, end, BLOCK):
            items = first + tl.arange(0, BLOCK)
            valid = _are_valid(where, items, items < end)
            u = sigma * (tl.load(scores + items, mask=valid, other=0) + middle)
            part = tl.exp(unit - tl.abs(u)) / (1 + tl.exp(-tl.abs(u)))
            excess += tl.sum(tl.where(valid, tl.where(u < 0, part, -part), 0), axis=0)
        low, high = tl.where(excess >= 0, low, middle), tl.where(excess >= 0, middle, high)
    shift = (low + high) / 2
    nearest = tl.full([], float("inf"), tl.float32)
    for first in range(begin, end, BLOCK):
        items = first + tl.arange(0, BLOCK)
        valid = _are_valid(where, items, items < end)
        u = sigma * (tl.load(scores + items, mask=valid, other=0) + shift)
        nearest = tl.minimum(nearest, tl.min(tl.where(valid, tl.abs(u), float("inf")), axis=0))
    loss, pull, response = tl.zeros([], tl.float32), tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    positives = tl.load(norms + number)
    for first in range(begin, end, BLOCK):
        items = first + tl.arange(0, BLOCK)
        valid = _are_valid(where, items, items < end)
        rest, minus_log_z, change = _soft_topk_values(scores, items, valid, sigma, shift, nearest)
        positive = valid & (tl.load(labels + items, mask=valid, other=0) > 0)
        loss += tl.sum(tl.where(positive, minus_log_z, 0), axis=0) / positives
        pull -= tl.sum(tl.where(positive, rest, 0), axis=0) / positives
        response += tl.sum(tl.where(valid, change, 0), axis=0)
    for first in range(begin, end, BLOCK):
        items = first + tl.arange(0, BLOCK)
        valid = _are_valid(where, items, items < end)
        rest, _, change = _soft_topk_values(scores, items, valid, sigma, shift, nearest)
        positive = valid & (tl.load(labels + items, mask=valid, other=0) > 0)
        slope = tl.where(positive, -rest / positives, 0) - change * pull / response
        tl.store(grad + items, sigma * slope, mask=valid)
    tl.store(losses + number, loss)


@triton.jit
def _soft_order(s, spread, present, rank, peak, total, count, temperature):
    """NeuralSort: rows softmax over the items of ((n + 1 - 2 rank) s - spread) / temperature, 0 outside."""
    slope = (count + 1 - 2 * rank).to(tl.float32)
    logits = (slope[:, None] * s[None, :] - spread[None, :]) / temperature
    inside = (rank <= count)[:, None] & present[None, :]
    return tl.where(inside, tl.exp(tl.where(inside, logits - peak[:, None], 0)) / total[:, None], 0)


@triton.jit
def _times_columns(
    x, rank, peak, total, scores, spreads, where, begin, end, count, temperature,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sum over the items of the soft order times x, for some ranks."""
    result = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(begin, end, COLUMNS):
        items = first + tl.arange(0, COLUMNS)
        present = _are_valid(where, items, items < end)
        s = tl.load(scores + items, mask=present, other=0)
        spread = tl.load(spreads + items, mask=present, other=0)
        weight = tl.load(x + items, mask=present, other=0)
        result += _soft_order(s, spread, present, rank, peak, total, count, temperature) * weight[None, :]
    return tl.sum(result, axis=1)


@triton.jit
def _times_rows(
    x, s, spread, present, peaks, totals, begin, count, temperature, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sum over the ranks of the soft order times x, for some items."""
    result = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, count, ROWS):
        places = first + tl.arange(0, ROWS)
        ranked = places < count
        peak = tl.load(peaks + begin + places, mask=ranked, other=0)
        total = tl.load(totals + begin + places, mask=ranked, other=1)
        weight = tl.load(x + begin + places, mask=ranked, other=0)
        result += _soft_order(s, spread, present, places + 1, peak, total, count, temperature) * weight[:, None]
    return tl.sum(result, axis=0)


@triton.jit
def _through_inverse(pull, scale):
    """Derivative with respect to x, given that with respect to scale = 1 / max(x, _TINY)."""
    return tl.where(scale * _TINY < 1, -(pull * scale) * scale, 0)


@triton.jit(do_not_specialize=["num_items", "k", "max_iterations"])
def _neural_ndcg_kernel(
    scores, labels, offsets, where, counts, norms, grad, losses, spreads, peaks, totals, pulls,
    row_scales, column_scales, row_pulls, column_pulls, num_items, k, temperature, tolerance, max_iterations,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """NDCG of Sinkhorn's scaling of a soft order K, recomputed wherever it is needed; one program a list.

    After t rounds the matrix is u_t[rank] K v_t[item]: v_t = 1 / K' u_{t-1} and u_t = 1 / K v_t lie in column_scales
    and row_scales, [rounds + 1, n], ones first. row_pulls and column_pulls, [rounds + 2, n], hold the derivatives p_t
    and q_t with respect to K v_t and K' u_{t-1}. That with respect to K is the sum of p_t v_t' + u_{t-1} q_t' over the
    rounds and of one more product for the loss, which lies behind them. Ranks take the places of a list's first items.
    A barrier stands wherever the next phase reads what other threads wrote.
    """
    number = tl.program_id(0)
    count = tl.load(counts + number)
    if count == 0:
        return
    begin, end = bounds(offsets, number, num_items)
    norm = tl.load(norms + number)
    stride = num_items.to(tl.int64)
    for start in range(begin, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        valid = _are_valid(where, rows, rows < end)
        s_i = tl.load(scores + rows, mask=valid, other=0)
        spread = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(begin, end, COLUMNS):
            items = first + tl.arange(0, COLUMNS)
            present = _are_valid(where, items, items < end)
            s = tl.load(scores + items, mask=present, other=0)
            spread += tl.where(present[None, :], tl.abs(s_i[:, None] - s[None, :]), 0)
        tl.store(spreads + rows, tl.sum(spread, axis=1), mask=valid)
    tl.debug_barrier()
    for start in range(0, count, ROWS):
        places = start + tl.arange(0, ROWS)
        slope = (count - 1 - 2 * places).to(tl.float32)
        peak = tl.full([ROWS], _LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for first in range(begin, end, COLUMNS):
            items = first + tl.arange(0, COLUMNS)
            present = _are_valid(where, items, items < end)
            s = tl.load(scores + items, mask=present, other=0)
            spread = tl.load(spreads + items, mask=present, other=0)
            logits = (slope[:, None] * s[None, :] - spread[None, :]) / temperature
            top = tl.max(tl.where(present[None, :], logits, _LOWEST), axis=1)
            shares = tl.exp(tl.where(present[None, :], logits - top[:, None], _LOWEST))
            peak, total = _add_exp(peak, total, top, tl.sum(shares, axis=1))
        tl.store(peaks + begin + places, peak, mask=places < count)
        tl.store(totals + begin + places, total, mask=places < count)
    tl.debug_barrier()

    rounds, going = tl.zeros([], tl.int32), count > 0  # true, and a tensor as in the loop
    while going:
        row_scale, column_scale = row_scales + rounds * stride, column_scales + rounds * stride
        off = tl.zeros([], tl.float32)
        for first in range(begin, end, COLUMNS):
            items = first + tl.arange(0, COLUMNS)
            present = _are_valid(where, items, items < end)
            s = tl.load(scores + items, mask=present, other=0)
            spread = tl.load(spreads + items, mask=present, other=0)
            sums = _times_rows(
                row_scale, s, spread, present, peaks, totals, begin, count, temperature, ROWS, COLUMNS
            )  # fmt: skip
            before = tl.load(column_scale + items, mask=present, other=1)
            off = tl.maximum(off, tl.max(tl.where(present, tl.abs(before * sums - 1), 0), axis=0))
            tl.store(column_scale + stride + items, 1 / tl.maximum(sums, _TINY), mask=present)
        tl.debug_barrier()
        for start in range(0, count, ROWS):
            places = start + tl.arange(0, ROWS)
            peak = tl.load(peaks + begin + places, mask=places < count, other=0)
            total = tl.load(totals + begin + places, mask=places < count, other=1)
            sums = _times_columns(
                column_scale + stride, places + 1, peak, total, scores, spreads, where, begin, end, count,
                temperature, ROWS, COLUMNS,
            )  # fmt: skip
            tl.store(row_scale + stride + begin + places, 1 / tl.maximum(sums, _TINY), mask=places < count)
        tl.debug_barrier()
        # Rows sum to 1 after every round, and these are the sums of the columns after the last one.
        converged = (rounds > 0) & (off < tolerance)
        rounds += tl.where(converged, 0, 1)
        going = (rounds < max_iterations) & (converged == 0)

    loss = tl.zeros([], tl.float32)
    for first in range(begin, end, COLUMNS):
        items = first + tl.arange(0, COLUMNS)
        present = _are_valid(where, items, items < end)
        gains = _gains(tl.load(labels + items, mask=present, other=0))
        column_scale = tl.load(column_scales + rounds * stride + items, mask=present, other=0)
        tl.store(column_pulls + (rounds + 1) * stride + items, gains * column_scale, mask=present)
    tl.debug_barrier()
    step = rounds
    while step > 0:
        for start in range(0, count, ROWS):
            places = start + tl.arange(0, ROWS)
            ranked = places < count
            peak = tl.load(peaks + begin + places, mask=ranked, other=0)
            total = tl.load(totals + begin + places, mask=ranked, other=1)
            pull = _times_columns(
                column_pulls + (step + 1) * stride, places + 1, peak, total, scores, spreads, where, begin, end, count,
                temperature, ROWS, COLUMNS,
            )  # fmt: skip
            scale = tl.load(row_scales + step * stride + begin + places, mask=ranked, other=0)
            if step == rounds:
                discount = tl.where(places < k, -1 / (norm * tl.log2(2.0 + places)), 0)
                pull *= discount
                loss += tl.sum(tl.where(ranked, pull * scale, 0), axis=0)
                tl.store(row_pulls + (step + 1) * stride + begin + places, discount * scale, mask=ranked)
            tl.store(row_pulls + step * stride + begin + places, _through_inverse(pull, scale), mask=ranked)
        tl.debug_barrier()
        for first in range(begin, end, COLUMNS):
            items = first + tl.arange(0, COLUMNS)
            present = _are_valid(where, items, items < end)
            s = tl.load(scores + items, mask=present, other=0)
            spread = tl.load(spreads + items, mask=present, other=0)
            pull = _times_rows(
                row_pulls + step * stride, s, spread, present, peaks, totals, begin, count, temperature, ROWS, COLUMNS
            )  # fmt: skip
            if step == rounds:
                gains = _gains(tl.load(labels + items, mask=present, other=0))
                pull += gains * _times_rows(
                    row_pulls + (step + 1) * stride, s, spread, present, peaks, totals, begin, count, temperature,
                    ROWS, COLUMNS,
                )  # fmt: skip
            scale = tl.load(column_scales + step * stride + items, mask=present, other=0)
            tl.store(column_pulls + step * stride + items, _through_inverse(pull, scale), mask=present)
        tl.debug_barrier()
        step -= 1
    tl.store(losses + number, loss)

    # Backward through the softmax of each rank: its sum of K times the derivative telescopes to K q_1.
    for start in range(0, count, ROWS):
        places = start + tl.arange(0, ROWS)
        peak = tl.load(peaks + begin + places, mask=places < count, other=0)
        total = tl.load(totals + begin + places, mask=places < count, other=1)
        mean = _times_columns(
            column_pulls + stride, places + 1, peak, total, scores, spreads, where, begin, end, count, temperature,
            ROWS, COLUMNS,
        )  # fmt: skip
        tl.store(row_pulls + begin + places, mean, mask=places < count)
    tl.debug_barrier()
    for first in range(begin, end, COLUMNS):
        items = first + tl.arange(0, COLUMNS)
        present = _are_valid(where, items, items < end)
        s = tl.load(scores + items, mask=present, other=0)
        spread = tl.load(spreads + items, mask=present, other=0)
        slope, pull = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, count, ROWS):
            places = start + tl.arange(0, ROWS)
            ranked = places < count
            peak = tl.load(peaks + begin + places, mask=ranked, other=0)
            total = tl.load(totals + begin + places, mask=ranked, other=1)
            order = _soft_order(s, spread, present, places + 1, peak, total, count, temperature)
            u, v = row_scales + begin + places, column_scales + stride + items
            p, q = row_pulls + begin + places, column_pulls + stride + items
            derivative = -tl.load(p, mask=ranked, other=0)[:, None] + tl.zeros([ROWS, COLUMNS], tl.float32)
            p += stride
            for _round in range(0, rounds):
                derivative += tl.load(p, mask=ranked, other=0)[:, None] * tl.load(v, mask=present, other=0)[None, :]
                derivative += tl.load(u, mask=ranked, other=0)[:, None] * tl.load(q, mask=present, other=0)[None, :]
                u += stride
                v += stride
                p += stride
                q += stride
            derivative += tl.load(p, mask=ranked, other=0)[:, None] * tl.load(q, mask=present, other=0)[None, :]
            derivative = order * derivative / temperature
            slope += derivative * (count - 1 - 2 * places).to(tl.float32)[:, None]
            pull -= derivative
        tl.store(grad + items, tl.sum(slope, axis=0), mask=present)
        tl.store(pulls + items, tl.sum(pull, axis=0), mask=present)
    tl.debug_barrier()
    for start in range(begin, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        valid = _are_valid(where, rows, rows < end)
        s_i = tl.load(scores + rows, mask=valid, other=0)[:, None]
        pull_i = tl.load(pulls + rows, mask=valid, other=0)[:, None]
        slope = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(begin, end, COLUMNS):
            items = first + tl.arange(0, COLUMNS)
            present = _are_valid(where, items, items < end)
            s = tl.load(scores + items, mask=present, other=0)[None, :]
            pull = pull_i + tl.load(pulls + items, mask=present, other=0)[None, :]
            slope += tl.where(present[None, :], tl.where(s_i > s, pull, tl.where(s_i < s, -pull, 0)), 0)
        direct = tl.load(grad + rows, mask=valid, other=0)
        tl.store(grad + rows, direct + tl.sum(slope, axis=1), mask=valid)


# What _survey_kernel divides by and asks of a list; "one" for the kinds that are not here.
_NEEDS = {
    "lambdarank": "ideal", "ndcg_loss1": "ideal", "ndcg_loss2": "ideal", "ndcg_loss2pp": "ideal",
    "softmax": "label_sum", "infonce": "both_signs", "decoupled_softmax": "both_signs",
    "pg_rank": "ideal", "approx_ndcg": "ideal", "neural_ndcg": "ideal", "soft_topk": "more_than_k",
}  # fmt: skip
_UNRANKED = ("ranknet", "soft_ranknet")
_SOFTMAX = ("listnet", "softmax", "infonce", "decoupled_softmax", "kl_distillation")
_PLACKETT_LUCE = ("listmle", "p_listmle", "pg_rank")

KINDS_COVERED = tuple(name for name in KINDS if name != "groco")


def listwise_loss(
    scores: torch.Tensor,
    labels: torch.Tensor,
    offsets: torch.Tensor,
    where: torch.Tensor | None,
    kind: str,
    reduction: str,
    settings: Settings,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient; see :func:`rankernel.listwise_loss`. Never waits for the device.

    Work memory is a few numbers an item, or an item and sample (pg_rank), or an item and iteration (neural_ndcg).
    Offsets that fall or leave the items give an unspecified result, but nothing outside the tensors is read or written.

    Args:
        scores: [n], float32, bfloat16 or float16, contiguous.
        labels: [n], float32.
        offsets: [B + 1], int64.
        where: [n], bool, or None.
        kind: one of :data:`KINDS_COVERED`.
        reduction: one of ``rankernel.listwise.REDUCTIONS``.
        settings: numbers of the kind.
        seed: list l draws with ``seed + l``.

    Returns:
        The loss, float32, [B] for "none" and [] otherwise; its gradient with respect to the scores, float32 [n].

    Raises:
        NotImplementedError: a kind without a kernel.
    """
    if kind not in KINDS_COVERED:
        raise NotImplementedError(f"kind: there is no Triton kernel for {kind}")
    call = _Call(scores, labels, offsets, where, kind, settings, seed)
    if call.num_lists:
        with torch.cuda.device_of(scores):
            call.run()
    losses, grad = call.losses, call.grad
    if reduction == "none":
        return losses, grad
    loss = losses.sum()
    if reduction != "sum":
        count = (call.pairs.sum() if reduction == "pair_mean" else (call.pairs > 0).sum()).clamp(min=1)
        loss = loss / count
        grad /= count
    return loss, grad


class _Call:
    """Tensors of one call, and the launches."""

    def __init__(
        self,
        scores: torch.Tensor,
        labels: torch.Tensor,
        offsets: torch.Tensor,
        where: torch.Tensor | None,
        kind: str,
        settings: Settings,
        seed: int,
    ) -> None:
        self.scores, self.labels, self.offsets, self.seed = scores.float(), labels, offsets, seed
        self.where = None if where is None else where.view(torch.uint8)
        self.kind, self.settings = kind, settings
        self.option = settings.option != 0
        self.num_items, self.num_lists = scores.numel(), offsets.numel() - 1
        self.k = int(settings.k) or 2**31 - 1
        self.counts = self.empty(self.num_lists, dtype=torch.int32)
        self.norms = self.empty(self.num_lists)
        # Zeros where nothing is written: lists that do not count, items of no list.
        self.losses = self.scores.new_zeros(self.num_lists)
        self.grad = self.scores.new_zeros(self.num_items)
        self.pairs = self.scores.new_zeros(self.num_lists, dtype=torch.int64)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.scores.new_empty(shape, dtype=dtype)

    def per_list(self, kernel: Any, *arguments: Any, samples: int = 1, **constants: Any) -> None:
        kernel[(self.num_lists, samples)](*arguments, **constants, num_warps=4, enable_fp_fusion=True)

    def per_tile(self, kernel: Any, *arguments: Any, samples: int = 1, **constants: Any) -> None:
        grid = (self.num_items // ROWS + self.num_lists, samples)
        kernel[grid](*arguments, **constants, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=2, enable_fp_fusion=True)

    def run(self) -> None:
        self.survey()
        if self.kind in _PLACKETT_LUCE:
            self.plackett_luce()
        elif self.kind in ("approx_ndcg", "approx_mrr"):
            self.smooth_ranks()
        elif self.kind == "neural_ndcg":
            self.neural_ndcg()
        elif KINDS[self.kind].pairwise:
            self.sum_of_pairs()
        else:
            given = (self.scores, self.labels, self.offsets, self.where, self.counts)
            if self.kind == "margin_mse":
                self.per_list(_margin_mse_kernel, *given, self.grad, self.losses, self.num_items, BLOCK=BLOCK)
            elif self.kind == "soft_topk":
                self.per_list(
                    _soft_topk_kernel, *given, self.norms, self.grad, self.losses, self.num_items, self.k,
                    self.settings.sigma, BISECTIONS=BISECTIONS, BLOCK=BLOCK,
                )  # fmt: skip
            else:
                self.per_list(
                    _softmax_kernel, *given, self.norms, self.grad, self.losses, self.num_items,
                    self.settings.temperature, KIND=self.kind, NORMALIZE=self.option, BLOCK=BLOCK,
                )  # fmt: skip
        if not KINDS[self.kind].pairwise:
            self.pairs = (self.counts > 0).to(torch.int64)

    def survey(self) -> None:
        needs = _NEEDS.get(self.kind, "one")
        if self.kind == "approx_mrr":
            needs = "positive_sum" if self.option else "relevant"
        elif self.kind in ("dcg_lambda", "dcg2_lambda") and self.option:
            needs = "ideal_or_one"
        label_order = self.order(self.labels) if needs in ("ideal", "ideal_or_one") else None
        self.per_list(
            _survey_kernel, self.labels, label_order, self.offsets, self.where, self.counts, self.norms, self.num_items,
            2**31 - 1 if self.kind == "approx_ndcg" else self.k,
            NEEDS=needs, DISTILLATION=KINDS[self.kind].distillation, BLOCK=BLOCK,
        )  # fmt: skip

    def count_ranks(
        self, keys: torch.Tensor, ties: torch.Tensor | None = None, shared: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ranks and order of keys, [n] or [S, n], as _rank_kernel has them."""
        ranks = torch.empty_like(keys, dtype=torch.int32)
        order = torch.zeros_like(keys, dtype=torch.int64)  # an item's index even where bad offsets leave it unwritten
        self.per_tile(
            _rank_kernel, keys, ties, self.offsets, self.where, ranks, order, self.num_items, self.num_lists,
            samples=keys.shape[0] if keys.dim() == 2 else 1, SHARED=shared,
        )  # fmt: skip
        return ranks, order

    def order(self, keys: torch.Tensor, ties: torch.Tensor | None = None) -> torch.Tensor:
        """The order alone; with stable sorts, the least significant key first, where there are many items."""
        if self.num_items <= COUNTING_LIMIT:
            return self.count_ranks(keys, ties)[1]
        # Number of an item's list; -1 and B for items before and after all lists.
        items = torch.arange(self.num_items, device=keys.device)
        lists = torch.searchsorted(self.offsets, items, right=True) - 1
        if self.where is not None:
            keys = keys.masked_fill(self.where == 0, -torch.inf)
        order = items.expand(keys.shape)
        if ties is not None:
            order = torch.sort(ties, stable=True).indices
        order = order.gather(-1, torch.sort(keys.gather(-1, order), stable=True, descending=True).indices)
        return order.gather(-1, torch.sort(lists[order], stable=True).indices)

    def sum_of_pairs(self) -> None:
        kind, settings = self.kind, self.settings
        ranks = None
        if kind == "weighted_ranknet" and not self.option:
            ranks, _ = self.count_ranks(self.labels, shared=True)
        elif kind == "skip_ranknet":
            ranks, _ = self.count_ranks(self.labels)
        elif kind not in _UNRANKED:
            ranks, _ = self.count_ranks(self.scores)
        row_losses, row_pairs = self.empty(self.num_items), self.empty(self.num_items, dtype=torch.int32)
        self.per_tile(
            _pair_kernel, self.scores, self.labels, ranks, self.offsets, self.where, self.counts, self.norms,
            self.grad, row_losses, row_pairs, self.num_items, self.num_lists,
            settings.sigma, settings.mu, settings.margin, self.k, KIND=kind, EITHER=self.option,
        )  # fmt: skip
        self.per_list(
            _pair_total_kernel, row_losses, row_pairs, self.offsets, self.where, self.counts, self.grad, self.losses,
            self.pairs, self.num_items, settings.unit, KIND=kind, DIVISOR=int(settings.divisor), BLOCK=BLOCK,
        )  # fmt: skip

    def smooth_ranks(self) -> None:
        smooth_ranks, pulls = self.empty(self.num_items), self.empty(self.num_items)
        given = (self.offsets, self.where, self.counts)
        last = (self.num_items, self.num_lists, self.settings.temperature)
        self.per_tile(_smooth_rank_kernel, self.scores, *given, smooth_ranks, *last)
        self.per_list(
            _smooth_loss_kernel, self.scores, self.labels, smooth_ranks, *given, self.norms, pulls, self.losses,
            self.num_items, KIND=self.kind, AVERAGE=self.option, BLOCK=BLOCK,
        )  # fmt: skip
        self.per_tile(_smooth_grad_kernel, self.scores, pulls, *given, self.grad, *last)

    def neural_ndcg(self) -> None:
        rounds = int(self.settings.number)
        scales = self.scores.new_ones(2, rounds + 1, self.num_items)
        pulls = self.empty(2, rounds + 2, self.num_items)
        self.per_list(
            _neural_ndcg_kernel, self.scores, self.labels, self.offsets, self.where, self.counts, self.norms, self.grad,
            self.losses, *self.empty(4, self.num_items), *scales, *pulls, self.num_items, self.k,
            self.settings.temperature, self.settings.tolerance, rounds, ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip

    def plackett_luce(self) -> None:
        policy = self.kind == "pg_rank"
        samples = int(self.settings.number) if policy else 1
        shuffled = self.kind == "listmle" and self.option
        draws = None
        if policy or shuffled:
            draws = self.empty(samples, self.num_items, dtype=torch.float64 if policy else torch.int64)
            self.per_list(
                _draw_kernel, self.scores, self.offsets, self.where, draws, self.num_items, self.seed,
                samples=samples, GUMBEL=policy, BLOCK=BLOCK,
            )  # fmt: skip
        order = self.order(draws) if policy else self.order(self.labels, draws[0] if shuffled else None)
        peaks, totals = self.empty(samples, self.num_items), self.empty(samples, self.num_items)
        slopes = self.empty(samples, self.num_items) if policy else self.grad
        losses = self.empty(samples, self.num_lists) if policy else self.losses
        rewards = self.empty(samples, self.num_lists) if policy else None
        which = {"KIND": self.kind, "NORMALIZE": self.option, "BLOCK": BLOCK}
        self.per_list(
            _remaining_kernel, self.scores, self.labels, order, self.offsets, self.counts, self.norms, peaks, totals,
            losses, rewards, self.num_items, self.k, samples=samples, **which,
        )  # fmt: skip
        self.per_list(
            _plackett_luce_kernel, self.scores, order, self.offsets, self.counts, peaks, totals, slopes,
            self.num_items, self.k, samples=samples, **which,
        )  # fmt: skip
        if policy:
            self.per_list(
                _policy_kernel, losses, rewards, slopes, self.offsets, self.where, self.counts, self.grad, self.losses,
                self.num_items, samples, BLOCK=BLOCK,
            )  # fmt: skip


_TYPES = {
    "scores": "*fp32", "labels": "*fp32", "offsets": "*i64", "where": "*u8", "keys": "*fp32", "ties": "*i64",
    "ranks": "*i32", "order": "*i64", "draws": "*fp64", "counts": "*i32", "norms": "*fp32", "grad": "*fp32",
    "losses": "*fp32", "pairs": "*i64", "row_losses": "*fp32", "row_pairs": "*i32", "peaks": "*fp32",
    "totals": "*fp32", "rewards": "*fp32", "slopes": "*fp32", "sample_losses": "*fp32", "smooth_ranks": "*fp32",
    "pulls": "*fp32", "spreads": "*fp32", "row_scales": "*fp32", "column_scales": "*fp32", "row_pulls": "*fp32",
    "column_pulls": "*fp32", "num_items": "i32", "num_lists": "i32", "num_samples": "i32", "max_iterations": "i32",
    "k": "i32", "seed": "i64", "sigma": "fp32", "mu": "fp32", "margin": "fp32", "unit": "fp32", "temperature": "fp32",
    "tolerance": "fp32",
}  # fmt: skip
_TILE, _LIST = {"ROWS": ROWS, "COLUMNS": COLUMNS}, {"BLOCK": BLOCK}


def _case(kernel: Any, constants: dict[str, object], **types: str) -> CompileCase:
    signature = {
        name: "constexpr" if name in constants else types.get(name, _TYPES.get(name)) for name in kernel.arg_names
    }
    return CompileCase(kernel, signature, constants, 2 if "num_lists" in kernel.arg_names else 4)


COMPILE_CASES = (
    _case(_rank_kernel, _TILE | {"SHARED": False}),
    _case(_rank_kernel, _TILE | {"SHARED": False, "ties": None}, keys="*fp64"),
    _case(_rank_kernel, _TILE | {"SHARED": True, "ties": None, "where": None}),
    _case(_draw_kernel, _LIST | {"GUMBEL": True}),
    _case(_draw_kernel, _LIST | {"GUMBEL": False}, draws="*i64"),
    *(
        _case(_survey_kernel, _LIST | {"NEEDS": needs, "DISTILLATION": False})
        for needs in ("ideal", "ideal_or_one", "label_sum", "positive_sum", "both_signs", "more_than_k", "relevant")
    ),
    _case(_survey_kernel, _LIST | {"NEEDS": "one", "DISTILLATION": True, "order": None}),
    *(
        _case(_pair_kernel, _TILE | {"KIND": kind.name, "EITHER": either} | unranked)
        for kind in KINDS.values()
        if kind.pairwise
        for either in ((False, True) if "truncation" in kind.defaults else (False,))
        for unranked in [{"ranks": None} if kind.name in _UNRANKED else {}]
    ),
    _case(_pair_kernel, _TILE | {"KIND": "ndcg_loss2pp", "EITHER": True, "where": None}),
    *(_case(_pair_total_kernel, _LIST | {"KIND": "soft_ranknet", "DIVISOR": divisor}) for divisor in range(3)),
    *(_case(_softmax_kernel, _LIST | {"KIND": kind, "NORMALIZE": True}) for kind in _SOFTMAX),
    _case(_softmax_kernel, _LIST | {"KIND": "softmax", "NORMALIZE": False}),
    _case(_margin_mse_kernel, _LIST),
    *(_case(_remaining_kernel, _LIST | {"KIND": kind, "NORMALIZE": True}) for kind in _PLACKETT_LUCE),
    *(_case(_plackett_luce_kernel, _LIST | {"KIND": kind, "NORMALIZE": True}) for kind in _PLACKETT_LUCE),
    _case(_policy_kernel, _LIST),
    _case(_smooth_rank_kernel, _TILE),
    _case(_smooth_loss_kernel, _LIST | {"KIND": "approx_ndcg", "AVERAGE": False}),
    *(_case(_smooth_loss_kernel, _LIST | {"KIND": "approx_mrr", "AVERAGE": average}) for average in (False, True)),
    _case(_smooth_grad_kernel, _TILE),
    _case(_neural_ndcg_kernel, _TILE),
    _case(_soft_topk_kernel, _LIST | {"BISECTIONS": BISECTIONS}),
)
