"""Ranking losses as modules: one class a kind of :func:`rankernel.listwise_loss`, on padded or jagged scores."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F

from rankernel.listwise import KINDS, Settings, settings_of
from rankernel.ops import listwise_loss

__all__ = [
    "ApproxMRRLoss",
    "ApproxNDCGLoss",
    "DCG2LambdaLoss",
    "DCGLambdaLoss",
    "DecoupledSoftmaxLoss",
    "GroCoLoss",
    "InfoNCELoss",
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
    "SkipRankNetLoss",
    "SoftRankNetLoss",
    "SoftTopKLoss",
    "SoftmaxLoss",
    "WeightedRankNetLoss",
]


class _Signature:
    """What ``help`` and notebooks show of the constructor: the parameters of the kind with their published values."""

    def __get__(self, instance: object, owner: type[ListwiseLoss]) -> inspect.Signature:
        if instance is not None:  # which is called with scores
            raise AttributeError("__signature__")
        kind = KINDS[owner.kind]
        defaults = {**kind.defaults, "reduction": None, "convention": None, **({"seed": None} if kind.seeded else {})}
        keyword = inspect.Parameter.KEYWORD_ONLY
        return inspect.Signature([inspect.Parameter(name, keyword, default=value) for name, value in defaults.items()])


class ListwiseLoss(torch.nn.Module):
    """Base of the ranking losses; a subclass names its ``kind``.

    Args:
        reduction: ``"mean"`` over the lists that rank something, ``"sum"``, ``"none"`` (one loss a list), or
            ``"pair_mean"`` (losses over pairs: over all pairs of the batch). None: the convention's, else mean.
        convention: ``"allrank"``, ``"rax"`` or ``"tfr"``, where the kind has it: that library's log base, temperature,
            ties and reduction.
        seed: of ``PGRankLoss``, and of ``ListMLELoss`` with shuffled ties: list l draws with ``seed + l``. None: every
            call in training mode takes a new seed from PyTorch's generator of the CPU, so that ``torch.manual_seed``
            and checkpointing repeat it, and every call in evaluation mode takes 0. A captured CUDA graph repeats the
            seed of its capture.
        **parameters: of the kind. They replace the published values, which the signature of the class shows, and the
            convention's.

            - ``sigma``: multiplies score differences; ``temperature``: divides scores; ``steepness``: of smooth steps.
            - ``k``: only the best k count; None for all. ``truncation``: a pair counts if ``"both"`` or ``"either"`` of
              its items are among the best k.
            - ``log_base``: of the loss; 2 counts it in bits.
            - ``pair_reduction``: what divides the sum over a list's pairs: ``"sum"`` nothing, ``"mean"`` the number of
              pairs, ``"items"`` the number of items.

    Raises:
        ValueError: a parameter that the kind does not have, or a value out of range, naming the parameter.
    """

    kind: str
    __signature__ = _Signature()

    def __init__(
        self, *, reduction: str | None = None, convention: str | None = None, seed: int | None = None, **parameters: Any
    ) -> None:
        super().__init__()
        kind = KINDS[self.kind]
        settings = Settings(*settings_of(kind, reduction, convention, parameters)[1])
        if seed is not None and (not kind.seeded or isinstance(seed, bool) or not isinstance(seed, int)):
            raise ValueError(f"seed: expected {'an integer or None' if kind.seeded else 'None'}, got {seed!r}")
        named = {"reduction": reduction, "convention": convention}
        self.options = {**parameters, **{name: value for name, value in named.items() if value is not None}}
        self.seed = seed
        # Only samples and shuffled ties are random; anything else leaves the generator alone.
        self._random = kind.seeded and bool(settings.number or settings.option)

    def forward(
        self,
        scores: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        offsets: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of a batch of lists.

        Args:
            scores: [B, n] padded; or [n], the lists one after the other, one list without ``offsets`` and ``lengths``.
                float32, bfloat16 or float16 (float64 runs the reference). Differentiable, once.
            labels: the shape of scores, any real dtype; the higher the better.
            mask: the shape of scores, bool, True for items. Where it is False, scores and labels may hold anything, NaN
                included, and the gradient is exactly 0.
            offsets: [B + 1], int64 or int32, list l is ``offsets[l]:offsets[l + 1]``.
            lengths: [B], integers that add up to n. They are read on the host: on a GPU, ``offsets`` do not wait.

        Returns:
            float32 scalar, or [B] for ``reduction="none"`` (float64 for float64 scores).

        Raises:
            ValueError: shapes that do not fit, or lengths that do not add up.
            TypeError: a wrong dtype.
        """
        if scores.dim() not in (1, 2):
            raise ValueError(f"scores: expected shape [lists, items] or [items], got {list(scores.shape)}")
        for name, tensor in (("labels", labels), ("mask", mask)):
            if tensor is not None and tensor.shape != scores.shape:
                raise ValueError(
                    f"{name}: expected the shape of scores, {list(scores.shape)}, got {list(tensor.shape)}"
                )
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
        for name, tensor in (("offsets", offsets), ("lengths", lengths)):
            if tensor is not None and scores.dim() == 2:
                raise ValueError(f"{name}: expected None with padded scores, whose rows are the lists")
        if lengths is not None:
            if offsets is not None:
                raise ValueError("lengths: expected None with offsets")
            if lengths.dim() != 1 or int(lengths.sum()) != scores.shape[0]:
                raise ValueError(f"lengths: expected [lists] that add up to {scores.shape[0]}, got {lengths.tolist()}")
            offsets = F.pad(lengths.cumsum(0), (1, 0))
        elif offsets is None:
            lists, items = scores.shape if scores.dim() == 2 else (1, scores.shape[0])
            offsets = torch.arange(lists + 1, device=scores.device) * items
        return listwise_loss(
            scores.reshape(-1),
            labels.reshape(-1),
            offsets,
            self.kind,
            where=None if mask is None else mask.reshape(-1),
            seed=self._next_seed(),
            **self.options,
        )

    def _next_seed(self) -> int:
        if self._random and self.seed is None and self.training:
            return int(torch.randint(2**62, (), device="cpu"))
        return self.seed or 0

    def extra_repr(self) -> str:
        """What was given to the constructor."""
        given = self.options if self.seed is None else {**self.options, "seed": self.seed}
        return ", ".join(f"{name}={value!r}" for name, value in given.items())


# In the formulas: scores s, labels y, r_i the rank of item i by score, G_i = (2^y_i - 1) / maxDCG, D(r) = log2(1 + r).


class RankNetLoss(ListwiseLoss):
    """``softplus(-sigma (s_i - s_j))`` over pairs y_i > y_j.

    Burges et al. 2005, "Learning to rank using gradient descent". Conventions: allrank, rax, tfr.
    """

    kind = "ranknet"


class WeightedRankNetLoss(ListwiseLoss):
    """RankNet with pairs weighted by ``1 / (r_i + r_j)``, ranks by labels or (``ranks="scores"``) by scores.

    Reddy et al. 2024, "FIRST: Faster improved listwise reranking with single token decoding", arXiv 2406.15657.
    """

    kind = "weighted_ranknet"


class SoftRankNetLoss(ListwiseLoss):
    """Cross entropy of ``sigmoid(sigma (s_i - s_j))`` with the teacher's ``sigmoid(y_i - y_j)`` over all pairs.

    As in DeAR, "Dual-stage document reranking with reasoning agents", arXiv 2508.16998.
    """

    kind = "soft_ranknet"


class LambdaRankLoss(ListwiseLoss):
    """RankNet with pairs weighted by the change of nDCG when they swap: ``|G_i - G_j| |1 / D(r_i) - 1 / D(r_j)|``.

    Burges 2010, "From RankNet to LambdaRank to LambdaMART"; Wang et al. 2018. Conventions: allrank, tfr.
    """

    kind = "lambdarank"


class NDCG1Loss(ListwiseLoss):
    """RankNet over all ordered pairs, whatever their labels, weighted by ``G_i / D(r_i)``.

    Wang et al. 2018, "The LambdaLoss framework for ranking metric optimization", eq. 15. Convention: allrank.
    """

    kind = "ndcg_loss1"


class NDCG2Loss(ListwiseLoss):
    """RankNet with pairs weighted by ``|G_i - G_j| (1 / D(d) - 1 / D(d + 1))``, d = ``|r_i - r_j|``.

    Wang et al. 2018, "The LambdaLoss framework for ranking metric optimization", eq. 16. Conventions: allrank, tfr.
    """

    kind = "ndcg_loss2"


class NDCG2PPLoss(ListwiseLoss):
    """``mu`` times the weights of :class:`NDCG2Loss` plus those of :class:`LambdaRankLoss`.

    Wang et al. 2018, "The LambdaLoss framework for ranking metric optimization", eq. 17. Convention: allrank.
    """

    kind = "ndcg_loss2pp"


class LiPOLoss(ListwiseLoss):
    """RankNet with pairs weighted by ``|2^y_i - 2^y_j| |1 / ln(1 + r_i) - 1 / ln(1 + r_j)|``.

    Liu et al. 2024, "LiPO: Listwise preference optimization through learning-to-rank", arXiv 2402.01878: LiPO-lambda.
    """

    kind = "lipo"


class DCGLambdaLoss(ListwiseLoss):
    """RankNet with pairs weighted by n times the change of DCG@k when they swap; ``normalize=True``: of nDCG@k.

    rax's ``dcg_lambdaweight``. Convention: rax.
    """

    kind = "dcg_lambda"


class DCG2LambdaLoss(ListwiseLoss):
    """:class:`NDCG2Loss` with the weights of rax, n times as large, pairs that end below rank k scaled up.

    rax's ``dcg2_lambdaweight``. Convention: rax.
    """

    kind = "dcg2_lambda"


class SkipRankNetLoss(ListwiseLoss):
    """``softplus(margin - sigma (s_i - s_j))`` over the pairs that stand 1, 2, 4, 8, ... places apart by label.

    rankernel's own: O(n log n) pairs, near neighbours and far ones, in the spirit of RankList (arXiv 2508.09826).
    """

    kind = "skip_ranknet"


class ListNetLoss(ListwiseLoss):
    """Cross entropy of ``softmax(s / temperature)`` with ``softmax(y)``.

    Cao et al. 2007, "Learning to rank: from pairwise approach to listwise approach". Convention: allrank.
    """

    kind = "listnet"


class SoftmaxLoss(ListwiseLoss):
    """``-sum y_i log softmax(s / temperature)_i``; with ``normalize=True`` the labels are divided by their sum.

    Bruch et al. 2019, "An analysis of the softmax cross entropy loss for learning-to-rank". Conventions: rax, tfr.
    """

    kind = "softmax"


class InfoNCELoss(ListwiseLoss):
    """``logsumexp_all(s / temperature) - logsumexp_positives(s / temperature)``; positives have labels above 0.

    The auxiliary loss of BlockRank, "Scalable in-context ranking with generative models", arXiv 2510.05396.
    """

    kind = "infonce"


class DecoupledSoftmaxLoss(ListwiseLoss):
    """Mean over positives of the cross entropy of one positive against all negatives; positives do not compete.

    Gupta et al. 2024, "Dual-encoders for extreme multi-label classification" (DEXML), arXiv 2310.10636.
    """

    kind = "decoupled_softmax"


class KLDistillationLoss(ListwiseLoss):
    """``T^2 KL(softmax(y / T) || softmax(s / T))``, y the teacher's scores, T the temperature.

    Hinton et al. 2015, "Distilling the knowledge in a neural network".
    """

    kind = "kl_distillation"


class MarginMSELoss(ListwiseLoss):
    """Mean over negatives of ``((s_0 - s_j) - (y_0 - y_j))^2``: item 0 is the positive, y the teacher's scores.

    Hofstaetter et al. 2020, "Improving efficient neural ranking models with cross-architecture knowledge distillation".
    """

    kind = "margin_mse"


class ListMLELoss(ListwiseLoss):
    """Negative log likelihood of the order of the labels, or of its first k places, under Plackett-Luce.

    Xia et al. 2008, "Listwise approach to learning to rank". Equal labels keep their order, or with ``ties="shuffle"``
    get a random one. Conventions: allrank, rax, tfr.
    """

    kind = "listmle"


class PListMLELoss(ListwiseLoss):
    """:class:`ListMLELoss` with place p of n weighted by ``2^(n - p) - 1``, divided by their sum if ``normalize``.

    Lan et al. 2014, "Position-aware ListMLE". Convention: tfr.
    """

    kind = "p_listmle"


class PGRankLoss(ListwiseLoss):
    """Policy gradient of nDCG@k over ``num_samples`` Plackett-Luce orders, the mean of the others as baseline.

    Gao et al. 2023, "Policy-gradient training of language models for ranking" (Neural PG-RANK), arXiv 2310.04407.
    """

    kind = "pg_rank"


class ApproxNDCGLoss(ListwiseLoss):
    """Minus nDCG at the smooth ranks ``1/2 + sum_j sigmoid((s_j - s_i) / temperature)``.

    Qin et al. 2010, "A general approximation framework for direct optimization of information retrieval measures".
    Conventions: allrank, rax, tfr.
    """

    kind = "approx_ndcg"


class ApproxMRRLoss(ListwiseLoss):
    """Minus the reciprocal smooth rank (as in :class:`ApproxNDCGLoss`) of the best relevant item.

    ``relevance="average"``: the average of all items, weighted by label.

    Qin et al. 2010, "A general approximation framework for direct optimization of information retrieval measures".
    Conventions: rax, tfr.
    """

    kind = "approx_mrr"


class NeuralNDCGLoss(ListwiseLoss):
    """Minus nDCG@k of the gains sorted by a NeuralSort matrix that Sinkhorn's iterations make doubly stochastic.

    They end after ``max_iterations``, or once every row and column adds up to 1 within ``tolerance``.

    Pobrotyn and Bialobrzeski 2021, "NeuralNDCG: direct optimisation of a ranking metric", arXiv 2102.07831.
    Convention: allrank.
    """

    kind = "neural_ndcg"


class SoftTopKLoss(ListwiseLoss):
    """Mean over positives of ``-log z``, z a smooth choice of k items: ``sigmoid(steepness (s + t))`` that add up to k.

    Gupta et al. 2024, "Dual-encoders for extreme multi-label classification" (DEXML), arXiv 2310.10636.
    """

    kind = "soft_topk"


class GroCoLoss(ListwiseLoss):
    """Cross entropy of positives above the ``num_negatives`` hardest negatives, by a differentiable sorting network.

    Shvetsova et al. 2023, "Learning by sorting: self-supervised learning with group ordering constraints" (GroCo);
    the network is that of Petersen et al. 2022, "Monotonic differentiable sorting networks".
    """

    kind = "groco"
