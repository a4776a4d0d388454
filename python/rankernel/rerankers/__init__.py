"""Rerankers: one module per method, all behind :class:`Reranker`."""

from typing import Any, NamedTuple

from rankernel.rerankers.blockrank import BlockRank
from rankernel.rerankers.embedding import E2Rank
from rankernel.rerankers.first import FIRST
from rankernel.rerankers.groupwise import Groupwise
from rankernel.rerankers.icr import ICR, IE_INSTRUCTION, QRHEAD_LLAMA_3_1_8B_LME, QRHEAD_LLAMA_3_1_8B_NQ, select_heads
from rankernel.rerankers.iterative import IRanker
from rankernel.rerankers.pairwise import Pairwise
from rankernel.rerankers.pointwise import MONOT5, QWEN3_RERANKER, ERank, Pointwise, PointwisePrompt, RankLLaMA
from rankernel.rerankers.prompts import BLOCKRANK, BLOCKRANK_QUERY_FREE, COMPACT, BlockPrompt
from rankernel.rerankers.protocol import ListScores, RankedDocument, Ranking, Reranker


class Method(NamedTuple):
    """A reranker by the name that the command line knows.

    Attributes:
        reranker: its class.
        settings: of the class, beside its defaults.
    """

    reranker: Any
    settings: dict[str, Any]


METHODS = {
    "blockrank": Method(BlockRank, {}),
    "icr": Method(ICR, {}),
    "qrhead": Method(ICR, {"heads": QRHEAD_LLAMA_3_1_8B_NQ, "instruction": IE_INSTRUCTION}),
    "first": Method(FIRST, {}),
    "qwen3-reranker": Method(Pointwise, {"prompt": QWEN3_RERANKER}),
    "monot5": Method(Pointwise, {"prompt": MONOT5}),
    "rankllama": Method(RankLLaMA, {}),
    "erank": Method(ERank, {"score": "top"}),
    "erank-expected": Method(ERank, {"score": "expected"}),
    "prp-allpair": Method(Pairwise, {"method": "allpair"}),
    "prp-heapsort": Method(Pairwise, {"method": "heapsort"}),
    "prp-sliding": Method(Pairwise, {"method": "sliding"}),
    "grouprank": Method(Groupwise, {}),
    "iranker": Method(IRanker, {}),
    "e2rank": Method(E2Rank, {}),
}
"""Every method by name: ``METHODS[name].reranker.from_pretrained(model, **METHODS[name].settings)``."""

__all__ = [
    "BLOCKRANK",
    "BLOCKRANK_QUERY_FREE",
    "COMPACT",
    "FIRST",
    "ICR",
    "IE_INSTRUCTION",
    "METHODS",
    "MONOT5",
    "QRHEAD_LLAMA_3_1_8B_LME",
    "QRHEAD_LLAMA_3_1_8B_NQ",
    "QWEN3_RERANKER",
    "BlockPrompt",
    "BlockRank",
    "E2Rank",
    "ERank",
    "Groupwise",
    "IRanker",
    "ListScores",
    "Method",
    "Pairwise",
    "Pointwise",
    "PointwisePrompt",
    "RankLLaMA",
    "RankedDocument",
    "Ranking",
    "Reranker",
    "select_heads",
]
