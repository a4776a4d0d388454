"""Rerankers: one module per method, all behind :class:`Reranker`."""

from rankernel.rerankers.blockrank import BlockRank
from rankernel.rerankers.prompts import BLOCKRANK, BLOCKRANK_QUERY_FREE, COMPACT, BlockPrompt
from rankernel.rerankers.protocol import RankedDocument, Ranking, Reranker

__all__ = [
    "BLOCKRANK",
    "BLOCKRANK_QUERY_FREE",
    "COMPACT",
    "BlockPrompt",
    "BlockRank",
    "RankedDocument",
    "Ranking",
    "Reranker",
]
