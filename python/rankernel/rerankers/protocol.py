"""What every reranker takes and gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, overload, runtime_checkable

import numpy as np

Pair = tuple[str, str]
"""Query and document."""


@dataclass(frozen=True)
class RankedDocument:
    """One row of a ranking.

    Attributes:
        index: place of the document in the list that was ranked, from 0.
        score: relevance, higher is better; its scale is the method's.
        rank: place in the ranking, from 1.
        truncated: whether the document was cut to the reranker's limit before it was read.
        document_id: the caller's identifier, if one was given.
    """

    index: int
    score: float
    rank: int
    truncated: bool
    document_id: str | None = None


class Ranking(Sequence[RankedDocument]):
    """The documents of one query, best first.

    Attributes:
        query: text of the query.
    """

    def __init__(self, query: str, rows: Sequence[RankedDocument]) -> None:
        self.query = query
        self._rows = tuple(rows)

    @classmethod
    def from_scores(
        cls,
        query: str,
        scores: Sequence[float],
        truncated: Sequence[bool],
        *,
        document_ids: Sequence[str] | None = None,
        top_k: int | None = None,
    ) -> Ranking:
        """Sorts documents by score; equal scores keep their order.

        Args:
            query: text of the query.
            scores: one per document.
            truncated: one per document.
            document_ids: one per document, if there are any.
            top_k: how many of the best to keep; None keeps all.
        """
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_k]
        identifiers = [None] * len(scores) if document_ids is None else document_ids
        return cls(
            query,
            [
                RankedDocument(index, scores[index], rank, truncated[index], identifiers[index])
                for rank, index in enumerate(order, start=1)
            ],
        )

    @overload
    def __getitem__(self, index: int) -> RankedDocument: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[RankedDocument, ...]: ...

    def __getitem__(self, index: int | slice) -> RankedDocument | tuple[RankedDocument, ...]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[RankedDocument]:
        return iter(self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranking) and (self.query, self._rows) == (other.query, other._rows)

    def __hash__(self) -> int:
        return hash((self.query, self._rows))

    def __repr__(self) -> str:
        lines = [f"Ranking({self.query!r}, {len(self)} documents)"]
        for row in self[:10]:
            name = row.document_id if row.document_id is not None else f"document {row.index}"
            lines.append(f"{row.rank:4d}  {row.score:.6f}  {name}{'  (truncated)' if row.truncated else ''}")
        return "\n".join(lines + ["  ..."] * (len(self) > 10))


@runtime_checkable
class Reranker(Protocol):
    """Orders the documents that a first stage found for a query."""

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        *,
        document_ids: Sequence[str] | None = None,
    ) -> Ranking:
        """Ranks the documents of one query."""

    def rank_many(
        self,
        queries: Sequence[str],
        documents: Sequence[Sequence[str]],
        top_k: int | None = None,
        *,
        document_ids: Sequence[Sequence[str]] | None = None,
        batch_tokens: int = ...,
    ) -> list[Ranking]:
        """Ranks the documents of several queries, in the order of the queries."""

    def predict(self, sentences: Sequence[Pair] | Pair, *, batch_tokens: int = ...) -> np.ndarray | np.float32:
        """Scores (query, document) pairs, in the order given."""
