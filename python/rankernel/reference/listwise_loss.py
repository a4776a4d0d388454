"""Specification of listwise_loss in plain PyTorch: one function a kind, one list at a time, differentiable, any dtype.

``s`` are the scores and ``y`` the labels of the valid items of one list, ``[n]``; ranks are 1-based, the higher score
or label first, the lower index first among equals. Weights made of ranks and labels carry no gradient. A function
returns the list's loss and the number of its pairs, or None where the list ranks nothing. METHODS.md section 8 has the
formulas.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rankernel.listwise import KINDS, REDUCTIONS, Settings

Result = tuple[torch.Tensor, int] | None


def listwise_loss(
    scores: torch.Tensor,
    labels: torch.Tensor,
    offsets: torch.Tensor,
    where: torch.Tensor | None,
    kind: str,
    reduction: str,
    settings: Settings,
    seed: int = 0,
) -> torch.Tensor:
    """See :func:`rankernel.listwise_loss`; the loss has the dtype of scores, and list l draws with ``seed + l``."""
    bounds = offsets.tolist()
    loss_of, distillation = _LOSSES[kind], KINDS[kind].distillation
    values, pairs = [], []
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        s, y = scores[begin:end], labels[begin:end].to(scores.dtype)
        if where is not None:
            s, y = s[where[begin:end]], y[where[begin:end]]
        result = None
        if len(s) > 1 and (distillation or bool((y != y[0]).any())):
            result = loss_of(s, y, settings, seed + number)
        values.append(scores.new_zeros(()) if result is None else settings.unit * result[0])
        pairs.append(0 if result is None else result[1])
        if result is not None and settings.divisor == 1:
            values[-1] = values[-1] / result[1]
        elif settings.divisor == 2:
            values[-1] = values[-1] / max(len(s), 1)
    losses = torch.stack(values) if values else scores.new_zeros(0)
    losses = losses + 0 * scores[:0].sum()  # even a batch without lists has a gradient
    if reduction == "none":
        return losses
    count = {"sum": 1, "mean": sum(p > 0 for p in pairs), "pair_mean": sum(pairs)}[reduction]
    return losses.sum() / max(count, 1)


def order_of(values: torch.Tensor) -> torch.Tensor:
    """Indices from the highest value down, the lower index first among equals."""
    return torch.sort(values, descending=True, stable=True).indices


def ranks_of(values: torch.Tensor) -> torch.Tensor:
    """1-based position of every value in :func:`order_of`, in its dtype."""
    ranks = torch.empty_like(values)
    ranks[order_of(values)] = torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device)
    return ranks


def gains_of(y: torch.Tensor) -> torch.Tensor:
    """2^y - 1; labels below 0 gain nothing."""
    return torch.exp2(y.clamp(min=0)) - 1


def ideal_dcg(y: torch.Tensor, k: float) -> torch.Tensor:
    """The highest sum of gains / log2(1 + rank) over the first k ranks."""
    ranks = ranks_of(y)
    return torch.where(ranks <= (k or len(y)), gains_of(y) / torch.log2(1 + ranks), 0).sum()


def philox(seed: int, sample: int, count: int) -> np.ndarray:
    """First word of Philox4x32-10 for the counters (i, sample, 0, 0), i < count; the key is the seed (uint32 [count]).

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Every implementation draws the same.
    """
    low = np.uint64(0xFFFFFFFF)
    c = [np.arange(count, dtype=np.uint64), np.full(count, sample, dtype=np.uint64)] + [np.zeros(count, np.uint64)] * 2
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]), b & low,
             (a >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]), a & low]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0].astype(np.uint32)


# Sums over pairs. Everything here is sum_ij weight_ij * softplus(-sigma (s_i - s_j)).


def _pairs(s: torch.Tensor, weights: torch.Tensor, counted: torch.Tensor, settings: Settings) -> Result:
    if not counted.any():
        return None
    losses = F.softplus(-settings.sigma * (s[:, None] - s[None, :]))
    return torch.where(counted, weights * losses, 0).sum(), int(counted.sum())


def _better(y: torch.Tensor) -> torch.Tensor:
    return y[:, None] > y[None, :]


def _ranknet(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    return _pairs(s, torch.ones_like(s), _better(y), settings)


def _weighted_ranknet(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    # Equal labels share the best rank among them, so that the order of the items does not matter.
    ranks = ranks_of(s.detach()) if settings.option else 1 + _better(y).sum(dim=0).to(s.dtype)
    return _pairs(s, 1 / (ranks[:, None] + ranks[None, :]), _better(y), settings)


def _soft_ranknet(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    # The cross entropy of both orders of a pair is the same number, so each pair counts once, with both its directions.
    targets = torch.sigmoid(y[:, None] - y[None, :])
    different = ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    loss, pairs = _pairs(s, targets, different, settings) or (s.sum(), 0)
    return loss, pairs // 2


def _truncated(pos: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Pairs that the cut at rank k keeps."""
    inside = pos <= (settings.k or len(pos))
    if settings.option:
        return inside[:, None] | inside[None, :]
    return inside[:, None] & inside[None, :]


def _delta(distance: torch.Tensor) -> torch.Tensor:
    """1 / log2(1 + d) - 1 / log2(2 + d) for d >= 1, 0 for d = 0."""
    d = distance.clamp(min=1)
    return torch.where(distance > 0, 1 / torch.log2(1 + d) - 1 / torch.log2(2 + d), 0)


def _ndcg_weighted(name: str) -> Callable[[torch.Tensor, torch.Tensor, Settings, int], Result]:
    def loss(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
        ideal = ideal_dcg(y, settings.k)
        if not ideal > 0:
            return None
        pos, gains = ranks_of(s.detach()), gains_of(y) / ideal.clamp(min=1e-10)
        discounts, counted = 1 / torch.log2(1 + pos), _truncated(pos, settings)
        if name == "ndcg_loss1":
            return _pairs(s, (gains * discounts)[:, None], counted, settings)
        difference = (gains[:, None] - gains[None, :]).abs()
        absolute = (discounts[:, None] - discounts[None, :]).abs() * difference
        relative = _delta((pos[:, None] - pos[None, :]).abs()) * difference
        weights = {
            "lambdarank": absolute,
            "ndcg_loss2": relative,
            "ndcg_loss2pp": settings.mu * relative + absolute,
        }[name]
        return _pairs(s, weights, counted & _better(y), settings)

    return loss


def _lipo(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    gains, discounts = torch.exp2(y), 1 / torch.log(1 + ranks_of(s.detach()))
    weights = (gains[:, None] - gains[None, :]).abs() * (discounts[:, None] - discounts[None, :]).abs()
    return _pairs(s, weights, _better(y), settings)


def _dcg_gains(y: torch.Tensor, settings: Settings) -> torch.Tensor:
    gains = gains_of(y)
    ideal = ideal_dcg(y, settings.k)
    return gains / ideal if settings.option and ideal > 0 else gains


def _dcg_lambda(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    pos, gains = ranks_of(s.detach()), _dcg_gains(y, settings)
    discounts = torch.where(pos <= (settings.k or len(s)), 1 / torch.log2(1 + pos), 0)
    weights = (gains[:, None] - gains[None, :]).abs() * (discounts[:, None] - discounts[None, :]).abs()
    return _pairs(s, len(s) * weights, _better(y), settings)


def _dcg2_lambda(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    pos, gains = ranks_of(s.detach()), _dcg_gains(y, settings)
    weights = (gains[:, None] - gains[None, :]).abs() * _delta((pos[:, None] - pos[None, :]).abs())
    if settings.k:
        worse = torch.maximum(pos[:, None], pos[None, :])
        # Both at rank 1 is no pair; the clamp keeps the division finite there.
        outside = 1 / (1 - 1 / torch.log2(1 + worse.clamp(min=2)))
        weights = weights * torch.where(worse > settings.k, outside, 1)
    return _pairs(s, len(s) * weights, _better(y), settings)


def _skip_ranknet(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    """RankNet over the pairs that stand 1, 2, 4, 8, ... places apart in the order of the labels: O(n log n) pairs."""
    order, loss, pairs, skip = order_of(y), s.new_zeros(()), 0, 1
    while skip < len(s):
        better, worse = order[:-skip], order[skip:]
        counted = y[better] > y[worse]
        losses = F.softplus(settings.margin - settings.sigma * (s[better] - s[worse]))
        loss, pairs, skip = loss + torch.where(counted, losses, 0).sum(), pairs + int(counted.sum()), 2 * skip
    return loss, pairs


# Softmax over the list.


def _listnet(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    return -(F.softmax(y, dim=0) * F.log_softmax(s / settings.temperature, dim=0)).sum(), 1


def _softmax(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    target = y / y.sum() if settings.option else y
    if y.sum() == 0:
        return None
    return -(target * F.log_softmax(s / settings.temperature, dim=0)).sum(), 1


def _infonce(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    if not (y > 0).any() or (y > 0).all():
        return None
    logits = s / settings.temperature
    return logits.logsumexp(dim=0) - logits[y > 0].logsumexp(dim=0), 1


def _decoupled_softmax(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    if not (y > 0).any() or (y > 0).all():
        return None
    logits = s / settings.temperature
    others = logits[~(y > 0)].logsumexp(dim=0)
    return F.softplus(others - logits[y > 0]).mean(), 1


def _kl_distillation(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    teacher = F.log_softmax(y / settings.temperature, dim=0)
    student = F.log_softmax(s / settings.temperature, dim=0)
    return settings.temperature**2 * (teacher.exp() * (teacher - student)).sum(), 1


def _margin_mse(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    """The first item is the positive, the others are its negatives; labels are the teacher's scores."""
    return ((s[0] - s[1:]) - (y[0] - y[1:])).square().mean(), 1


# Plackett-Luce.


def _plackett_luce(s: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_k weights_k (log sum_{j >= k} exp(s_order_j) - s_order_k)"""
    ordered = s[order]
    remaining = torch.logcumsumexp(ordered.flip(0), dim=0).flip(0)
    return (weights * (remaining - ordered)).sum()


def _listmle(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    order = order_of(y)
    if settings.option:
        shuffled = torch.from_numpy(np.argsort(philox(seed, 0, len(s)), kind="stable")).to(s.device)
        order = shuffled[order_of(y[shuffled])]
    rank = torch.arange(len(s), device=s.device)
    return _plackett_luce(s, order, (rank < (settings.k or len(s))).to(s.dtype)), 1


def _p_listmle(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    # 2^(n - rank) - 1, or that divided by its sum 2^n - 1 - n, counted in units of 2^n for long lists.
    n, rank = len(s), torch.arange(1, len(s) + 1, device=s.device, dtype=torch.float64)
    if settings.option:
        weights = (torch.exp2(-rank) - 2.0**-n) / (1 - (n + 1) * 2.0**-n)
    else:
        weights = torch.exp2(n - rank) - 1
    return _plackett_luce(s, order_of(y), weights.to(s.dtype)), 1


def _pg_rank(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    """-1/N sum_i (R_i - mean of the other R) log PL(order_i), R the nDCG@k of a sampled order."""
    ideal, samples = ideal_dcg(y, settings.k), int(settings.number)
    if not ideal > 0:
        return None
    discounts = 1 / torch.log2(torch.arange(2, len(s) + 2, device=s.device, dtype=s.dtype))
    discounts[int(settings.k) or len(s) :] = 0
    orders = []
    for sample in range(samples):
        uniform = (philox(seed, sample, len(s)).astype(np.float64) + 0.5) / 2.0**32
        gumbel = torch.from_numpy(-np.log(-np.log(uniform))).to(s.device)
        orders.append(order_of(s.detach().double() + gumbel))
    rewards = torch.stack([(gains_of(y)[order] * discounts).sum() / ideal for order in orders])
    advantages = (rewards - rewards.mean()) * samples / (samples - 1)
    ones = torch.ones_like(s)
    losses = [advantage * _plackett_luce(s, order, ones) for advantage, order in zip(advantages, orders, strict=True)]
    return torch.stack(losses).mean(), 1


# Ranks made smooth.


def _smooth_ranks(s: torch.Tensor, temperature: float) -> torch.Tensor:
    """R_i = 1/2 + sum_j sigmoid((s_j - s_i) / T), j = i included"""
    return 0.5 + torch.sigmoid((s[None, :] - s[:, None]) / temperature).sum(dim=1)


def _approx_ndcg(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    ideal = ideal_dcg(y, 0)
    if not ideal > 0:
        return None
    return -(gains_of(y) / ideal / torch.log2(1 + _smooth_ranks(s, settings.temperature))).sum(), 1


def _approx_mrr(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    ranks = _smooth_ranks(s, settings.temperature)
    if settings.option:
        weights = y.clamp(min=0)
        return (-(weights / ranks).sum() / weights.sum(), 1) if weights.any() else None
    if not (y >= 1).any():
        return None
    best = torch.where(y >= 1, s.detach(), -torch.inf).argmax()  # the smooth ranks fall as scores rise
    return -1 / ranks[best], 1


def _neural_ndcg(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    ideal, n = ideal_dcg(y, settings.k), len(s)
    if not ideal > 0:
        return None
    rank = torch.arange(1, n + 1, device=s.device, dtype=s.dtype)
    spread = (s[:, None] - s[None, :]).abs().sum(dim=1)
    order = F.softmax(((n + 1 - 2 * rank)[:, None] * s[None, :] - spread[None, :]) / settings.temperature, dim=1)
    for _ in range(int(settings.number)):
        order = order / order.sum(dim=0, keepdim=True).clamp(min=1e-10)
        order = order / order.sum(dim=1, keepdim=True).clamp(min=1e-10)
        off = torch.maximum((order.sum(dim=0) - 1).abs().max(), (order.sum(dim=1) - 1).abs().max())
        if off < settings.tolerance:
            break
    discounts = torch.where(rank <= (settings.k or n), 1 / torch.log2(1 + rank), 0)
    return -(discounts * (order @ gains_of(y))).sum() / ideal, 1


class _SoftTopK(torch.autograd.Function):
    """u = sigma (x + t) with t such that sum sigmoid(u) = k, by bisection."""

    @staticmethod
    def forward(x: torch.Tensor, k: float, sigma: float) -> torch.Tensor:
        margin = (10 + math.log(len(x))) / sigma
        low, high = -x.max() - margin, -x.min() + margin
        for _ in range(64 if x.dtype == torch.float64 else 40):
            middle = (low + high) / 2
            u = sigma * (x + middle)
            # sum z - k = #(u >= 0) - k + what the items of either side are short of 0 or 1. Where the count is k, that
            # is in units of the largest such part: a wide gap between the best k and the rest has its middle found.
            count, nearest = (u >= 0).sum(), u.abs().min()
            short = (torch.where(count == k, nearest, 0) - u.abs()).exp() / (1 + (-u.abs()).exp())
            enough = count - k + torch.where(u < 0, short, -short).sum() >= 0
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return sigma * (x + (low + high) / 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, float, float], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.sigma = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (u,) = ctx.saved_tensors
        # dt/dx_j = -v_j / sum v, v = z (1 - z)
        share = torch.softmax(F.logsigmoid(u) + F.logsigmoid(-u), dim=0)
        return ctx.sigma * (grads[0] - share * grads[0].sum()), None, None


def _soft_topk(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    if len(s) <= settings.k or not (y > 0).any():  # everything is among the best k
        return None
    return -F.logsigmoid(_SoftTopK.apply(s, settings.k, settings.sigma)[y > 0]).mean(), 1


def _groco(s: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int) -> Result:
    """Odd-even network of n layers with Cauchy swaps over the hardest negatives and the positives, both ascending."""
    positive = y > 0
    if not positive.any() or positive.all():
        return None
    rising = order_of(s.detach()).flip(0)
    negatives = rising[~positive[rising]][-int(settings.number) :]
    wires = torch.cat([negatives, rising[positive[rising]]])
    x, n, num_negatives = s[wires], len(wires), len(negatives)
    mixed = torch.eye(n, dtype=s.dtype, device=s.device)  # [wires, ranks]
    for layer in range(n):
        a = torch.arange(layer % 2, n - 1, 2, device=s.device)
        b = a + 1
        alpha = torch.atan(settings.sigma * (x[b] - x[a])) / torch.pi + 0.5
        low, high = alpha * x[a] + (1 - alpha) * x[b], (1 - alpha) * x[a] + alpha * x[b]
        x = x.index_copy(0, a, low).index_copy(0, b, high)
        left, right = mixed[:, a], mixed[:, b]
        mixed = mixed.index_copy(1, a, alpha * left + (1 - alpha) * right)
        mixed = mixed.index_copy(1, b, (1 - alpha) * left + alpha * right)
    # Rows of `mixed` sum to 1, so the two cross entropies of the paper are the same number.
    hit = torch.cat(
        [mixed[:num_negatives, :num_negatives].sum(dim=1), mixed[num_negatives:, num_negatives:].sum(dim=1)]
    )
    return -hit.clamp(min=1e-30, max=1).log().mean(), 1


_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, Settings, int], Result]] = {
    "ranknet": _ranknet,
    "weighted_ranknet": _weighted_ranknet,
    "soft_ranknet": _soft_ranknet,
    "lambdarank": _ndcg_weighted("lambdarank"),
    "ndcg_loss1": _ndcg_weighted("ndcg_loss1"),
    "ndcg_loss2": _ndcg_weighted("ndcg_loss2"),
    "ndcg_loss2pp": _ndcg_weighted("ndcg_loss2pp"),
    "lipo": _lipo,
    "dcg_lambda": _dcg_lambda,
    "dcg2_lambda": _dcg2_lambda,
    "skip_ranknet": _skip_ranknet,
    "listnet": _listnet,
    "softmax": _softmax,
    "infonce": _infonce,
    "decoupled_softmax": _decoupled_softmax,
    "kl_distillation": _kl_distillation,
    "margin_mse": _margin_mse,
    "listmle": _listmle,
    "p_listmle": _p_listmle,
    "pg_rank": _pg_rank,
    "approx_ndcg": _approx_ndcg,
    "approx_mrr": _approx_mrr,
    "neural_ndcg": _neural_ndcg,
    "soft_topk": _soft_topk,
    "groco": _groco,
}
assert list(_LOSSES) == list(KINDS)
assert REDUCTIONS[0] == "none"
