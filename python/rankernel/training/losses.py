"""Joint losses: the answer's language-model loss plus ranking losses on scores of the same forward pass.

Sources: BlockRank, arXiv 2510.05396, section 3.3; FIRST, arXiv 2406.15657; METHODS.md sections 1.5, 1.6, 3.3, 4, 6.6.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F

from rankernel.listwise import kind_named
from rankernel.models import ScoreRequest, model_inputs
from rankernel.rerankers.blockrank import BlockRankSettings
from rankernel.rerankers.blockrank import relevance as document_scores_from_logsumexp
from rankernel.training.collator import RankingBatch
from rankernel.training.ranking_losses import ListwiseLoss

__all__ = [
    "JointLoss",
    "RankingObjective",
    "answer_loss",
    "document_scores_from_logsumexp",
    "first_loss",
    "joint_loss",
    "log_document_scores_from_logsumexp",
]

Score = Literal["share", "log_share"]


class JointLoss(NamedTuple):
    """The parts and their weighted sum, scalars, float32.

    Attributes:
        total: what to call ``backward`` on.
        language_model: :func:`answer_loss`.
        ranking: ranking loss on the labels.
        teacher: ranking loss on the teacher's scores; 0 without one.
        scores: [L, N], the document scores that the ranking losses were computed from, before the temperature.
    """

    total: torch.Tensor
    language_model: torch.Tensor
    ranking: torch.Tensor
    teacher: torch.Tensor
    scores: torch.Tensor


class RankingObjective:
    """``language_model_weight * language model + ranking_weight * ranking + teacher_weight * teacher``.

    The defaults are BlockRank's. FIRST's are in :attr:`FIRST`.

    Args:
        language_model_weight: of :func:`answer_loss`.
        ranking_loss: kind of :func:`rankernel.listwise_loss` for the labels.
        ranking_weight: its weight.
        ranking_parameters: of that kind. As scores come divided by ``temperature``, a kind that has a temperature of
            its own gets 1 unless this says otherwise.
        teacher_loss: kind for the teacher's scores, such as ``"kl_distillation"``, ``"margin_mse"``,
            ``"soft_ranknet"`` or ``"weighted_ranknet"``; None for none. ``"margin_mse"`` takes the document with
            the best label for the positive one.
        teacher_weight: its weight.
        teacher_parameters: of that kind, otherwise the published ones; a temperature divides both sides.
        temperature: divides the scores; None is 0.05 for shares, as published, else 1.
        score: what BlockRank's documents are scored by: their share of the attention, as published, or its logarithm,
            whose gradient does not vanish for a document that has hardly any attention yet.

    Raises:
        ValueError: an unknown kind or score, or a number that is unfit.
    """

    FIRST: ClassVar[Mapping[str, Any]] = {
        "ranking_loss": "weighted_ranknet",
        "ranking_weight": 10.0,
        "temperature": 1.0,
    }

    def __init__(
        self,
        *,
        language_model_weight: float = 1.0,
        ranking_loss: str = "infonce",
        ranking_weight: float = 0.1,
        ranking_parameters: Mapping[str, Any] | None = None,
        teacher_loss: str | None = None,
        teacher_weight: float = 1.0,
        teacher_parameters: Mapping[str, Any] | None = None,
        temperature: float | None = None,
        score: Score = "share",
    ) -> None:
        if score not in ("share", "log_share"):
            raise ValueError(f"score: expected 'share' or 'log_share', got {score!r}")
        temperature = (0.05 if score == "share" else 1.0) if temperature is None else temperature
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        self.language_model_weight = language_model_weight
        self.ranking_weight = ranking_weight
        self.teacher_weight = teacher_weight
        self.temperature = temperature
        self.score = score
        self.ranking_loss = _loss_of_kind(ranking_loss, ranking_parameters or {})
        self.teacher_loss = None if teacher_loss is None else _loss_of_kind(teacher_loss, teacher_parameters or {})

    def __call__(
        self, language_model: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, batch: RankingBatch
    ) -> JointLoss:
        """The loss of a batch.

        Args:
            language_model: scalar.
            scores: [L, N]; what is not present may hold anything, NaN included.
            labels: [L, N], what ``ranking_loss`` aims at.
            batch: has the teacher's scores.

        Raises:
            ValueError: a ``teacher_loss`` without a teacher in the batch.
        """
        scaled = scores / self.temperature
        ranking = self.ranking_loss(scaled, labels, batch.present)
        total = self.language_model_weight * language_model + self.ranking_weight * ranking
        teacher = torch.zeros_like(ranking)
        if self.teacher_loss is not None:
            if batch.teacher_scores is None:
                raise ValueError("teacher_loss: expected examples with teacher_scores, got none")
            # Margin-MSE takes the first document for the positive one; for the other kinds the order is nothing.
            order = labels.masked_fill(~batch.present, -torch.inf).argsort(dim=1, descending=True, stable=True)
            teacher = self.teacher_loss(*(t.gather(1, order) for t in (scaled, batch.teacher_scores, batch.present)))
            total = total + self.teacher_weight * teacher
        return JointLoss(total, language_model, ranking, teacher, scores)


def _loss_of_kind(name: str, parameters: Mapping[str, Any]) -> ListwiseLoss:
    kind = kind_named(name)
    scaled = "temperature" in kind.defaults and not kind.distillation
    losses = {loss.kind: loss for loss in ListwiseLoss.__subclasses__()}
    return losses[name](**{**({"temperature": 1.0} if scaled else {}), **parameters})


def log_document_scores_from_logsumexp(logsumexp: torch.Tensor, num_lists: int) -> torch.Tensor:
    """Logarithm of :func:`document_scores_from_logsumexp`, exact where the scores themselves round to 0.

    Args:
        logsumexp: [num_lists * signal rows, heads, N], rows list by list.
        num_lists: how many lists the rows belong to.

    Returns:
        [num_lists, N]; about -10000, without a gradient, for a document without tokens.
    """
    # Far below any attention logit, but finite: between infinities the gradient would be NaN.
    votes = logsumexp.clamp(min=-1e4).log_softmax(dim=-1).unflatten(0, (num_lists, -1)).flatten(1, 2)
    return votes.logsumexp(dim=1) - math.log(votes.shape[1])


def answer_loss(logits: torch.Tensor, batch: RankingBatch) -> torch.Tensor:
    """``sum_t w_t NLL_t / number of answer tokens``, w the batch's ``answer_weights``.

    Args:
        logits: [A, vocabulary], at ``batch.answer_rows``.
        batch: the batch.

    Returns:
        Scalar float32, nats; 0 for a batch without answers.
    """
    losses = F.cross_entropy(logits.float(), batch.answer_ids, reduction="none")
    return (losses * batch.answer_weights).sum() / max(batch.answer_ids.numel(), 1)


def joint_loss(
    model: Any, batch: RankingBatch, settings: BlockRankSettings, objective: RankingObjective | None = None
) -> JointLoss:
    """BlockRank's loss of one batch, from one forward pass; the head runs on the rows of the answers alone.

    Args:
        model: an attached causal language model, in any wrapper (DistributedDataParallel, FSDP2, PEFT, torch.compile).
        batch: of a :class:`RankingCollator`, on the device of the model.
        settings: scoring layer and positions.
        objective: default: language-model loss + 0.1 * InfoNCE with temperature 0.05, as published.

    Raises:
        ValueError: a layer that the model does not have, or what ``objective`` refuses.
    """
    objective = objective or RankingObjective()
    inputs = model_inputs(
        batch.input_ids,
        batch.layout,
        position_scheme=settings.position_scheme,
        tail_offset=settings.tail_offset,
        scores=ScoreRequest([settings.layer], batch.signal_rows),
    )
    outputs = _forward(model, inputs, batch)
    pool = document_scores_from_logsumexp if objective.score == "share" else log_document_scores_from_logsumexp
    scores = pool(outputs.attentions[0], batch.layout.num_lists)
    return objective(answer_loss(outputs.logits[0], batch), scores, batch.labels, batch)


def first_loss(
    model: Any, batch: RankingBatch, letters: torch.Tensor, objective: RankingObjective | None = None
) -> JointLoss:
    """FIRST's loss of one batch: a document's score is the logit of its letter behind the answer's ``[``.

    The ranking loss aims at the order of the answer, which is the teacher's where there is one.

    Args:
        model: as for :func:`joint_loss`.
        batch: of a :class:`FirstCollator`, on the device of the model.
        letters: [window] integers, :attr:`FirstCollator.letters`.
        objective: default: language-model loss + 10 * weighted RankNet.

    Raises:
        ValueError: what ``objective`` refuses.
    """
    objective = objective or RankingObjective(**RankingObjective.FIRST)
    inputs = model_inputs(batch.input_ids, batch.layout, position_scheme="sequential")
    logits = _forward(model, inputs, batch).logits[0]
    signal = torch.searchsorted(batch.answer_rows, batch.signal_rows)
    candidates = letters[: batch.present.shape[1]].to(logits.device)
    scores = logits[signal][:, candidates].float()
    labels = batch.labels if batch.teacher_scores is None else batch.teacher_scores
    return objective(answer_loss(logits, batch), scores, labels, batch)


def _forward(model: Any, inputs: dict[str, Any], batch: RankingBatch) -> Any:
    """The model's outputs, with logits at the rows of the answers."""
    # Compiled code shall serve rows of any size from the first one on, as in BlockLayout.
    if "torch._dynamo" in sys.modules:
        for tensor, dimension in ((inputs["input_ids"], 1), (inputs["position_ids"], 1), (batch.answer_rows, 0)):
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)
        for rows in inputs["block_scores"].row_groups if "block_scores" in inputs else ():
            torch._dynamo.maybe_mark_dynamic(rows, 0)
    return model(**inputs, logits_to_keep=batch.answer_rows)
