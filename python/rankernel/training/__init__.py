"""Training: ranking losses as modules, lists of documents to packed rows, joint losses, and trainers.

The trainers are loaded when they are first asked for, as Transformers' ``Trainer`` takes seconds. The losses for
sentence-transformers are in :mod:`rankernel.training.sentence_transformers`, imported by itself.
"""

from typing import TYPE_CHECKING, Any

from rankernel.training.collator import FirstCollator, RankingBatch, RankingCollator
from rankernel.training.data import RankingDataset, RankingExample, RankingTask, read_task
from rankernel.training.losses import (
    JointLoss,
    RankingObjective,
    answer_loss,
    document_scores_from_logsumexp,
    first_loss,
    joint_loss,
    log_document_scores_from_logsumexp,
)
from rankernel.training.ranking_losses import (
    ApproxMRRLoss,
    ApproxNDCGLoss,
    DCG2LambdaLoss,
    DCGLambdaLoss,
    DecoupledSoftmaxLoss,
    GroCoLoss,
    InfoNCELoss,
    KLDistillationLoss,
    LambdaRankLoss,
    LiPOLoss,
    ListMLELoss,
    ListNetLoss,
    ListwiseLoss,
    MarginMSELoss,
    NDCG1Loss,
    NDCG2Loss,
    NDCG2PPLoss,
    NeuralNDCGLoss,
    PGRankLoss,
    PListMLELoss,
    RankNetLoss,
    SkipRankNetLoss,
    SoftmaxLoss,
    SoftRankNetLoss,
    SoftTopKLoss,
    WeightedRankNetLoss,
)
from rankernel.training.sampler import TokenBudgetSampler

if TYPE_CHECKING:
    from rankernel.training.trainer import BlockRankTrainer, FirstTrainer, RankingArguments, RankingTrainer

__all__ = [
    "ApproxMRRLoss",
    "ApproxNDCGLoss",
    "BlockRankTrainer",
    "DCG2LambdaLoss",
    "DCGLambdaLoss",
    "DecoupledSoftmaxLoss",
    "FirstCollator",
    "FirstTrainer",
    "GroCoLoss",
    "InfoNCELoss",
    "JointLoss",
    "KLDistillationLoss",
    "LambdaRankLoss",
    "LiPOLoss",
    "ListMLELoss",
    "ListNetLoss",
    "ListwiseLoss",
    "MarginMSELoss",
    "NDCG1Loss",
    "NDCG2Loss",
    "NDCG2PPLoss",
    "NeuralNDCGLoss",
    "PGRankLoss",
    "PListMLELoss",
    "RankNetLoss",
    "RankingArguments",
    "RankingBatch",
    "RankingCollator",
    "RankingDataset",
    "RankingExample",
    "RankingObjective",
    "RankingTask",
    "RankingTrainer",
    "SkipRankNetLoss",
    "SoftRankNetLoss",
    "SoftTopKLoss",
    "SoftmaxLoss",
    "TokenBudgetSampler",
    "WeightedRankNetLoss",
    "answer_loss",
    "document_scores_from_logsumexp",
    "first_loss",
    "joint_loss",
    "log_document_scores_from_logsumexp",
    "read_task",
]


def __getattr__(name: str) -> Any:
    if name in ("BlockRankTrainer", "FirstTrainer", "RankingArguments", "RankingTrainer"):
        from rankernel.training import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
