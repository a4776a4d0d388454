"""BlockRank's joint loss: the answer's language-model loss plus a contrastive loss on the attention of one layer.

Sources: arXiv 2510.05396, section 3.3; METHODS.md sections 1.5 and 1.6.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from rankernel.models import ScoreRequest, model_inputs
from rankernel.models.attach import decoder_of, unwrap
from rankernel.ops import listwise_loss
from rankernel.rerankers.blockrank import BlockRankSettings
from rankernel.rerankers.blockrank import relevance as document_scores_from_logsumexp
from rankernel.training.collator import RankingBatch

__all__ = [
    "JointLoss",
    "answer_loss",
    "attention_contrastive_loss",
    "document_scores_from_logsumexp",
    "joint_loss",
]


class JointLoss(NamedTuple):
    """``total = language_model + weight * contrastive``, scalars, float32.

    Attributes:
        total: what to call ``backward`` on.
        language_model: mean negative log-likelihood of the answer tokens, in nats.
        contrastive: :func:`attention_contrastive_loss`, in nats.
        scores: [L, max_documents], the document scores S_d that ``contrastive`` was computed from.
    """

    total: torch.Tensor
    language_model: torch.Tensor
    contrastive: torch.Tensor
    scores: torch.Tensor


def attention_contrastive_loss(
    scores: torch.Tensor, positives: torch.Tensor, present: torch.Tensor, temperature: float = 0.05
) -> torch.Tensor:
    """InfoNCE over a list's document scores, the positives summed inside the logarithm (METHODS.md section 1.6).

    ``mean over lists of [ logsumexp_d(S_d / temperature) - logsumexp_{d in positives}(S_d / temperature) ]``

    Args:
        scores: [L, N] S_d; entries that are not ``present`` may hold anything, NaN included.
        positives: bool [L, N], True for relevant documents.
        present: bool [L, N], True for documents of the list.
        temperature: the published value is 0.05.

    Returns:
        Scalar in the dtype of ``scores``. Lists without a positive are left out of the mean; 0 if none has one.

    Raises:
        ValueError: shapes that differ, a positive that is not present, or a temperature that is not positive.
    """
    if not scores.shape == positives.shape == present.shape or scores.dim() != 2:
        raise ValueError(
            "scores, positives, present: expected one shape [lists, documents], got "
            f"{list(scores.shape)}, {list(positives.shape)}, {list(present.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if (positives & ~present).any():
        raise ValueError("positives: expected documents that are present, got one that is not")
    offsets = torch.arange(len(scores) + 1, device=scores.device) * scores.shape[1]
    total = listwise_loss(
        scores.reshape(-1),
        positives.reshape(-1),
        offsets,
        "infonce",
        where=present.reshape(-1),
        reduction="sum",
        temperature=temperature,
    )
    # The op's mean would leave out lists of positives alone, whose loss is 0 too.
    return (total / positives.any(dim=1).sum().clamp(min=1)).to(scores.dtype)


def answer_loss(model: torch.nn.Module, hidden: torch.Tensor, batch: RankingBatch) -> torch.Tensor:
    """Mean negative log-likelihood of the answer tokens; the head runs on their rows alone.

    Args:
        model: the causal language model.
        hidden: [T, E], what its decoder made of the batch.
        batch: the batch.

    Returns:
        Scalar float32, nats; 0 for a batch without answers.
    """
    logits = unwrap(model).get_output_embeddings()(hidden[batch.answer_rows]).float()
    return F.cross_entropy(logits, batch.answer_ids, reduction="sum") / max(batch.answer_ids.numel(), 1)


def joint_loss(
    model: Any,
    batch: RankingBatch,
    settings: BlockRankSettings,
    *,
    weight: float = 0.1,
    temperature: float = 0.05,
) -> JointLoss:
    """``language-model loss + weight * contrastive loss`` of one batch, from one pass of an attached model.

    Args:
        model: an attached causal language model.
        batch: on the device of the model.
        settings: scoring layer and positions.
        weight: the published value is 0.1.
        temperature: see :func:`attention_contrastive_loss`.

    Raises:
        ValueError: a layer that the model does not have, or what the called functions refuse.
    """
    inputs = model_inputs(
        batch.input_ids,
        batch.layout,
        position_scheme=settings.position_scheme,
        tail_offset=settings.tail_offset,
        scores=ScoreRequest([settings.layer], batch.signal_rows),
    )
    outputs = decoder_of(model)(**inputs)
    scores = document_scores_from_logsumexp(outputs.attentions[0], batch.layout.num_lists)
    contrastive = attention_contrastive_loss(scores, batch.positives, batch.present, temperature)
    language_model = answer_loss(model, outputs.last_hidden_state[0], batch)
    return JointLoss(language_model + weight * contrastive, language_model, contrastive, scores)
