"""Drop-in losses for sentence-transformers' ``CrossEncoder``: same names, constructors and values, on our kernels.

``from rankernel.training.sentence_transformers import LambdaLoss`` in place of
``from sentence_transformers.cross_encoder.losses import LambdaLoss`` is the whole change. Scores stay packed instead of
padded, memory is linear in the number of documents, and the gradient comes with the loss in one pass. Equal labels and
equal scores keep the order of the documents. What the kernels do not cover runs the parent's forward; every class says
what that is. Written against sentence-transformers 6.2.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from sentence_transformers.cross_encoder import losses
from sentence_transformers.util import batch_to_device

from rankernel.ops import listwise_loss

__all__ = ["LambdaLoss", "ListMLELoss", "ListNetLoss", "PListMLELoss", "RankNetLoss"]

Inputs = list[list[str] | list[list[str]]]

# A scheme of another class, such as a user's subclass, has weights of its own.
_KINDS = {
    losses.NoWeightingScheme: "ranknet",
    losses.NDCGLoss1Scheme: "ndcg_loss1",
    losses.NDCGLoss2Scheme: "ndcg_loss2",
    losses.LambdaRankScheme: "lambdarank",
    losses.NDCGLoss2PPScheme: "ndcg_loss2pp",
}


def _lengths(loss: Any, inputs: Inputs, labels: list[torch.Tensor]) -> list[int]:
    """Documents a query. Raises ValueError, because the trainer takes a TypeError for an old signature and retries."""
    name = type(loss).__name__
    if isinstance(labels, torch.Tensor):
        raise ValueError(f"labels: {name} expects a list with one tensor a query, got one tensor")
    if len(inputs) != 2:
        raise ValueError(f"inputs: {name} expects two (queries, documents of every query), got {len(inputs)}")
    lengths, labelled = [len(documents) for documents in inputs[1]], [len(y) for y in labels]
    if lengths != labelled:
        raise ValueError(f"labels: expected one a document, {lengths} a query, got {labelled}")
    return lengths


def _score(
    loss: Any, inputs: Inputs, lengths: list[int], prompt: str | None, task: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of all documents, query after query, and the offsets of the queries."""
    queries, documents = inputs
    pairs = [(query, document) for query, listed in zip(queries, documents, strict=True) for document in listed]
    size = loss.mini_batch_size or len(queries)
    size = size if size > 0 else len(pairs)
    scores = []
    for start in range(0, len(pairs), size):
        features = loss.model.preprocess(pairs[start : start + size], prompt=prompt, task=task)
        scores.append(loss.model(batch_to_device(features, loss.model.device))["scores"].view(-1))
    packed = loss.activation_fn(torch.cat(scores).float())
    return packed, torch.tensor([0, *itertools.accumulate(lengths)], device=packed.device)


class LambdaLoss(losses.LambdaLoss):
    """LambdaLoss with every weighting scheme of sentence-transformers.

    The parent's forward runs for other schemes, for ``NoWeightingScheme`` with a cut at ``k``, for an ``eps`` that is
    not the default, and for batches with a list that our op leaves out although the parent counts its pairs: labels
    that differ without a positive one, or, with ``NDCGLoss1Scheme``, labels that are all equal.
    """

    def forward(
        self, inputs: Inputs, labels: list[torch.Tensor], prompt: str | None = None, task: str | None = None
    ) -> torch.Tensor:
        """The loss of a batch: the sum over the pairs of all queries, divided by their number.

        Args:
            inputs: the queries, and the documents of every query.
            labels: one tensor a query, one label a document.
            prompt: for the preprocessing of pairs.
            task: for the preprocessing of pairs.

        Raises:
            ValueError: inputs and labels that do not fit together.
        """
        lengths = _lengths(self, inputs, labels)
        if not self._fused(labels):
            return super().forward(inputs, labels, prompt=prompt, task=task)
        scores, offsets = _score(self, inputs, lengths, prompt, task)
        kind = _KINDS[type(self.weighting_scheme)]
        options: dict[str, Any] = {} if kind == "ranknet" else {"k": self.k or None, "truncation": "either"}
        if kind == "ndcg_loss2pp":
            options["mu"] = self.weighting_scheme.mu
        return listwise_loss(
            scores,
            torch.cat(labels).to(scores.device),
            offsets,
            kind,
            reduction="pair_mean",
            sigma=self.sigma,
            log_base=2.0 if self.reduction_log == "binary" else math.e,
            **options,
        )

    def _fused(self, labels: list[torch.Tensor]) -> bool:
        scheme = type(self.weighting_scheme)
        if scheme is losses.NoWeightingScheme:
            return not self.k
        if scheme not in _KINDS or self.eps != 1e-10:
            return False
        for y in torch.cat(labels).cpu().split([len(y) for y in labels]):
            low, high = (y.min(), y.max()) if len(y) else (0, 0)
            if (high <= 0 and low < high) or (scheme is losses.NDCGLoss1Scheme and low == high):
                return False
        return True


class RankNetLoss(LambdaLoss, losses.RankNetLoss):
    """RankNet: LambdaLoss without weights. The parent's forward runs for a cut at ``k``."""


class ListNetLoss(losses.ListNetLoss):
    """ListNet: cross entropy of the softmax of the scores with the softmax of the labels, the mean over queries."""

    def forward(
        self, inputs: Inputs, labels: list[torch.Tensor], prompt: str | None = None, task: str | None = None
    ) -> torch.Tensor:
        """The loss of a batch; see :meth:`LambdaLoss.forward`."""
        lengths = _lengths(self, inputs, labels)
        scores, offsets = _score(self, inputs, lengths, prompt, task)
        targets = torch.cat(labels).to(scores.device)

        def divergence(of: torch.Tensor) -> torch.Tensor:
            return listwise_loss(of, targets, offsets, "kl_distillation", reduction="sum", temperature=1.0)

        # Equal labels are a target here, which the kind "listnet" leaves out. With p the softmax of the labels and q
        # that of the scores, the cross entropy is KL(p || q) + entropy(p) = KL(p || q) - KL(p || uniform) + ln n.
        uniform = sum(math.log(n) for n in lengths if n)
        return (divergence(scores) - divergence(torch.zeros_like(scores)) + uniform) / len(lengths)


class PListMLELoss(losses.PListMLELoss):
    """Position-aware ListMLE, and ListMLE without ``lambda_weight``, the mean over queries.

    The parent's forward runs for a ``lambda_weight`` other than the default.
    """

    def forward(
        self, inputs: Inputs, labels: list[torch.Tensor], prompt: str | None = None, task: str | None = None
    ) -> torch.Tensor:
        """The loss of a batch; see :meth:`LambdaLoss.forward`."""
        lengths = _lengths(self, inputs, labels)
        weight = self.lambda_weight
        default = type(weight) is losses.PListMLELambdaWeight and weight.rank_discount_fn is None
        if not (weight is None or default):
            return super().forward(inputs, labels, prompt=prompt, task=task)
        scores, offsets = _score(self, inputs, lengths, prompt, task)
        if not self.respect_input_order:
            scores = scores[_by_label(torch.cat(labels).to(scores.device), lengths)]
        # The order of the documents is the target, also where labels are equal.
        order = -torch.arange(len(scores), device=scores.device)
        kind = "p_listmle" if default else "listmle"
        return listwise_loss(scores, order, offsets, kind, reduction="sum") / len(lengths)


def _by_label(labels: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Indices that sort every list by label, the highest first, the earlier document first among equals."""
    order = labels.sort(descending=True, stable=True).indices
    number = torch.arange(len(lengths), device=labels.device)
    number = number.repeat_interleave(torch.tensor(lengths, device=labels.device))
    return order[number[order].sort(stable=True).indices]


class ListMLELoss(PListMLELoss, losses.ListMLELoss):
    """ListMLE: negative log likelihood of the order of the documents or labels, the mean over queries."""
