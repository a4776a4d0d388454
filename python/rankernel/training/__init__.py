"""Training of block-sparse rerankers: lists of documents to packed rows, and the joint loss."""

from rankernel.training.collator import RankingBatch, RankingCollator, RankingExample
from rankernel.training.losses import (
    JointLoss,
    answer_loss,
    attention_contrastive_loss,
    document_scores_from_logsumexp,
    joint_loss,
)

__all__ = [
    "JointLoss",
    "RankingBatch",
    "RankingCollator",
    "RankingExample",
    "answer_loss",
    "attention_contrastive_loss",
    "document_scores_from_logsumexp",
    "joint_loss",
]
