"""Ranking losses, forward and backward, against PyTorch on matrices of padded lists.

All lists have the same length, so that no implementation works on padding. Every call returns the gradient of the
scores, times pairs per item (pair losses) or the number of items (the others): its entries are then of order 1 or
more, where errors show. allRank and sentence-transformers are formulations written anew: the first pins an old
PyTorch, the second computes its losses only behind a CrossEncoder.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cached_property, partial

import torch
import torch.nn.functional as F

import rankernel
from measure import Call, Case, Expected, Implementation, Problem
from rankernel import reference
from rankernel.listwise import KINDS, REDUCTIONS, Settings, settings_of

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of scores and labels, both [B, n]; a scalar."""
OP = "listwise_loss"
MU = 10.0  # of ndcg_loss2pp
EPS = 1e-10  # of allRank and of sentence-transformers
TOLERANCE, MAX_ITERATIONS = 1e-6, 50  # of Sinkhorn's scaling in NeuralNDCG


class Inputs:
    """Normal scores, and labels that are distinct or of five grades; made when first used."""

    def __init__(self, shape: tuple[int, int], graded: bool, dtype: torch.dtype, device: str) -> None:
        self.shape, self.graded, self.dtype, self.device = shape, graded, dtype, device

    @cached_property
    def scores(self) -> torch.Tensor:
        """[B, n], a leaf"""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.shape, generator=generator).to(self.device, self.dtype).requires_grad_()

    @cached_property
    def labels(self) -> torch.Tensor:
        """[B, n] float32"""
        generator = torch.Generator().manual_seed(1)
        lists, length = self.shape
        if self.graded:
            return torch.randint(5, self.shape, generator=generator).float().to(self.device)
        return torch.stack([torch.randperm(length, generator=generator) for _ in range(lists)]).float().to(self.device)

    @cached_property
    def offsets(self) -> torch.Tensor:
        """[B + 1] int64"""
        lists, length = self.shape
        return torch.arange(lists + 1, device=self.device) * length

    @property
    def pairs(self) -> int:
        """Pairs of items of one list whose labels differ, over all lists."""
        lists, length = self.shape
        if not self.graded:
            return lists * math.comb(length, 2)
        grades = F.one_hot(self.labels.long()).sum(dim=1)
        return int((length**2 - grades.square().sum(dim=1)).sum()) // 2

    def gradient(self, loss: Loss, scale: float) -> Call:
        """Forward and backward of ``loss``: the gradient of ``scale * loss``, [B, n]."""
        scores, labels = self.scores, self.labels
        factor = torch.tensor(scale, dtype=torch.float32, device=self.device)

        def call() -> torch.Tensor:
            with torch.enable_grad():
                return torch.autograd.grad(loss(scores, labels), scores, factor)[0]

        return call


# Plain PyTorch. Padding would be NaN in the labels: it is in no pair, so that no second mask is needed.


def ranknet(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """RankNet over all pairs of the batch."""
    better = labels[:, :, None] > labels[:, None, :]
    losses = F.softplus(scores[:, None, :] - scores[:, :, None])
    return torch.where(better, losses, 0).sum() / better.sum()


def _normalized_gains(labels: torch.Tensor) -> torch.Tensor:
    """(2^y - 1) / the ideal DCG of the list"""
    gains = torch.exp2(labels) - 1
    discounts = torch.log2(torch.arange(2, labels.shape[1] + 2, device=labels.device))
    return gains / (gains.sort(dim=1, descending=True).values / discounts).sum(dim=1, keepdim=True)


def _distances(values: torch.Tensor) -> torch.Tensor:
    """|v_i - v_j|, [B, n, n]"""
    return (values[:, :, None] - values[:, None, :]).abs()


def ndcg_loss2pp(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """NDCGLoss2++ in bits, the mean over all pairs of the batch."""
    better = labels[:, :, None] > labels[:, None, :]
    ranks = 1 + scores.detach().argsort(dim=1, descending=True).argsort(dim=1)
    apart = _distances(ranks).clamp(min=1)
    relative = 1 / torch.log2(1 + apart) - 1 / torch.log2(2 + apart)
    weights = (MU * relative + _distances(1 / torch.log2(1 + ranks))) * _distances(_normalized_gains(labels))
    losses = weights * F.softplus(scores[:, None, :] - scores[:, :, None])
    return torch.where(better, losses, 0).sum() / better.sum() / math.log(2)


def listmle(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """ListMLE, the mean over lists."""
    ordered = scores.gather(1, labels.argsort(dim=1, descending=True))
    remaining = ordered.flip(1).logcumsumexp(dim=1).flip(1)
    return (remaining - ordered).sum(dim=1).mean()


def approx_ndcg(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """ApproxNDCG, the mean over lists."""
    ranks = 0.5 + torch.sigmoid(scores[:, None, :] - scores[:, :, None]).sum(dim=2)
    return -(_normalized_gains(labels) / torch.log2(1 + ranks)).sum(dim=1).mean()


def neural_ndcg(scores: torch.Tensor, labels: torch.Tensor, stop_early: bool = False) -> torch.Tensor:
    """NeuralNDCG, the mean over lists; all iterations of Sinkhorn's scaling unless it may stop when converged."""
    length = scores.shape[1]
    rank = torch.arange(1, length + 1, device=scores.device)
    spread = _distances(scores).sum(dim=2)
    order = torch.softmax((length + 1 - 2 * rank)[:, None] * scores[:, None, :] - spread[:, None, :], dim=2)
    for _ in range(MAX_ITERATIONS):
        order = order / order.sum(dim=1, keepdim=True).clamp(min=EPS)
        order = order / order.sum(dim=2, keepdim=True).clamp(min=EPS)
        if stop_early and all(((order.sum(dim=dim) - 1).abs() < TOLERANCE).all() for dim in (1, 2)):
            break
    gains = (order @ _normalized_gains(labels)[:, :, None]).squeeze(2)
    return -(gains / torch.log2(1 + rank)).sum(dim=1).mean()


# The formulations of the libraries.


def ranknet_of_allrank(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """All ordered pairs as a list of indices, the better ones selected, binary cross entropy with the target 1."""
    pairs = torch.tensor(list(itertools.product(range(scores.shape[1]), repeat=2)), device=scores.device)
    of_labels, of_scores = labels[:, pairs], scores[:, pairs]
    selected = (of_scores[:, :, 0] - of_scores[:, :, 1])[of_labels[:, :, 0] - of_labels[:, :, 1] > 0]
    return F.binary_cross_entropy_with_logits(selected, torch.ones_like(selected))


def lambda_loss(scores: torch.Tensor, labels: torch.Tensor, bits: bool, weighted: bool) -> torch.Tensor:
    """LambdaLoss of both libraries: sorted matrices, log(clamp(sigmoid(d)) ** w), and a selection of pairs.

    Weighted by NDCGLoss2++, or without weights, which is RankNet.
    """
    ordered, order = scores.sort(dim=1, descending=True)
    labels_of_order = labels.gather(1, order)
    difference = labels_of_order[:, :, None] - labels_of_order[:, None, :]
    discounts = torch.log2(torch.arange(2, scores.shape[1] + 2, device=scores.device).float())
    best = labels.sort(dim=1, descending=True).values
    ideal = ((torch.exp2(best) - 1) / discounts).sum(dim=1).clamp(min=EPS)
    gains = (torch.exp2(labels_of_order) - 1) / ideal[:, None]
    weights: torch.Tensor | float = 1.0
    if weighted:
        position = torch.arange(scores.shape[1], device=scores.device)
        apart = (position[:, None] - position[None, :]).abs()
        relative = (1 / discounts[apart - 1] - 1 / discounts[apart]).abs()
        relative.diagonal().zero_()
        of_gains, of_discounts = _distances(gains), _distances(1 / discounts[None])
        weights = MU * relative[None] * of_gains + of_discounts * of_gains
    apart_scores = (ordered[:, :, None] - ordered[:, None, :]).clamp(min=-1e8, max=1e8)
    probabilities = (torch.sigmoid(apart_scores).clamp(min=EPS) ** weights).clamp(min=EPS)
    losses = torch.log2(probabilities) if bits else torch.log(probabilities)
    return -losses[torch.isfinite(difference) & (difference > 0)].mean()


def listmle_of_libraries(scores: torch.Tensor, labels: torch.Tensor, shuffled: bool) -> torch.Tensor:
    """log(cumsum(exp) + eps) in the order of the labels; allRank shuffles before it sorts."""
    if shuffled:
        index = torch.randperm(scores.shape[1], device=scores.device)
        scores, labels = scores[:, index], labels[:, index]
    ordered = scores.gather(1, labels.sort(dim=1, descending=True).indices)
    ordered = ordered - ordered.max(dim=1, keepdim=True).values
    remaining = ordered.exp().flip(1).cumsum(dim=1).flip(1)
    return (torch.log(remaining + EPS) - ordered).sum(dim=1).mean()


def approx_ndcg_of_allrank(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Everything in the order of the scores, with masks of valid pairs."""
    ordered, order = scores.sort(dim=1, descending=True)
    gains = _normalized_gains(labels).gather(1, order)
    labels_of_order = labels.gather(1, order)
    pairs = torch.isfinite(labels_of_order[:, :, None] - labels_of_order[:, None, :])
    pairs.diagonal(dim1=1, dim2=2).zero_()
    apart = ordered[:, :, None] - ordered[:, None, :]
    apart[~pairs] = 0.0
    ranks = 1 + (pairs.float() * torch.sigmoid(-apart).clamp(min=EPS)).sum(dim=2)
    return -(gains / torch.log2(1 + ranks)).sum(dim=1).mean()


ALLRANK, SENTENCE_TRANSFORMERS = "allRank formulation", "sentence-transformers formulation"
FORMULATIONS: dict[str, dict[str, Loss]] = {
    "ranknet": {
        "eager PyTorch": ranknet,
        ALLRANK: ranknet_of_allrank,
        SENTENCE_TRANSFORMERS: partial(lambda_loss, bits=False, weighted=False),
    },
    "ndcg_loss2pp": {
        "eager PyTorch": ndcg_loss2pp,
        f"allRank and {SENTENCE_TRANSFORMERS}": partial(lambda_loss, bits=True, weighted=True),
    },
    "listmle": {
        "eager PyTorch": listmle,
        ALLRANK: partial(listmle_of_libraries, shuffled=True),
        SENTENCE_TRANSFORMERS: partial(listmle_of_libraries, shuffled=False),
    },
    "approx_ndcg": {"eager PyTorch": approx_ndcg, ALLRANK: approx_ndcg_of_allrank},
    "neural_ndcg": {"eager PyTorch": neural_ndcg, ALLRANK: partial(neural_ndcg, stop_early=True)},
}
"""By kind; the first one also runs compiled."""


def problem(kind: str, shape: tuple[int, int], graded: bool, device: str, dtype: torch.dtype) -> Problem:
    """One kind and its peers, with inputs on ``device``."""
    inputs = Inputs(shape, graded, dtype, device)
    pairwise = KINDS[kind].pairwise
    convention, reduction = "allrank", "pair_mean" if pairwise else "mean"

    def scale() -> float:
        return inputs.pairs / shape[1] if pairwise else math.prod(shape)

    def exact(wide: torch.dtype) -> torch.Tensor:
        index, settings = settings_of(
            KINDS[kind], reduction, convention, {"ties": "stable"} if kind == "listmle" else {}
        )
        scores = inputs.scores.detach().to(wide).flatten().requires_grad_()
        with torch.enable_grad():
            loss = reference.listwise_loss(
                scores, inputs.labels.flatten(), inputs.offsets, None, kind, REDUCTIONS[index], Settings(*settings)
            )
            return torch.autograd.grad(scale() * loss, scores)[0].view(shape)

    expected = Expected(lambda: exact(torch.float64), lambda: exact(dtype))

    def native() -> Call:
        def loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return rankernel.listwise_loss(
                scores.view(-1), labels.view(-1), inputs.offsets, kind, reduction=reduction, convention=convention
            )

        return inputs.gradient(loss, scale())

    def formulation(name: str) -> Callable[[], Call]:
        return lambda: inputs.gradient(FORMULATIONS[kind][name], scale())

    def compiled() -> Call:
        torch._dynamo.reset()  # else the recompile limit, reached over many cases, falls back to eager
        loss = next(iter(FORMULATIONS[kind].values()))
        return inputs.gradient(torch.compile(loss, dynamic=False, fullgraph=True), scale())

    work = inputs.pairs
    rows = [Implementation("rankernel", native, expected, work, native_op=OP)]
    if device == "cuda":
        rows = [
            Implementation(f"rankernel {backend}", native, expected, work, native_op=OP, backend=backend)
            for backend in ("triton", "cuda")
        ]
    for name in FORMULATIONS[kind]:
        rows.append(Implementation(name, formulation(name), expected, work))
        if name == "eager PyTorch":
            rows.append(Implementation("the same compiled", compiled, expected, work))
    return Problem(tuple(rows), unit="pair")


def _case(
    name: str, kind: str, shape: tuple[int, int], graded: bool, seconds: float = 4.0, default: bool = False
) -> Case:
    labels = "labels of 5 grades" if graded else "distinct labels"
    on = partial(problem, kind, shape, graded)
    return Case(
        name,
        f"{kind}, {shape[0]} lists of {shape[1]} items, {labels}, forward and backward",
        partial(on, "cpu"),
        dtypes=(torch.float32,),
        seconds=seconds,
        default=default,
        build_on_gpu=partial(on, "cuda"),
    )


CASES = (
    *(_case(f"tiny-{kind.replace('_', '-')}", kind, (2, 20), kind != "listmle", seconds=0.1) for kind in FORMULATIONS),
    _case("ranknet-64x20", "ranknet", (64, 20), graded=False),
    _case("ranknet-64x100", "ranknet", (64, 100), graded=False),
    _case("ranknet-16x1000", "ranknet", (16, 1000), graded=False, default=True),
    _case("lambdarank-64x100", "ndcg_loss2pp", (64, 100), graded=True),
    _case("listmle-64x100", "listmle", (64, 100), graded=False),
    _case("approx-ndcg-64x100", "approx_ndcg", (64, 100), graded=True),
    _case("neural-ndcg-16x50", "neural_ndcg", (16, 50), graded=True),
)
