"""What every reranker takes and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast, overload

import numpy as np

from rankernel.models.packing import BATCH_TOKENS

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
        parts: what the score was made of, by name; which names there are depends on the method.
    """

    index: int
    score: float
    rank: int
    truncated: bool
    document_id: str | None = None
    parts: Mapping[str, float] = field(default_factory=dict, compare=False)


class ListScores(NamedTuple):
    """What a method says of one list; every field has one entry per document.

    Attributes:
        scores: relevance, higher is better.
        truncated: whether the document was cut before it was read.
        parts: what the score was made of.
    """

    scores: list[float]
    truncated: list[bool]
    parts: list[Mapping[str, float]]


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
        parts: Sequence[Mapping[str, float]] | None = None,
        *,
        document_ids: Sequence[str] | None = None,
        top_k: int | None = None,
    ) -> Ranking:
        """Sorts documents by score; equal scores keep their order.

        Args:
            query: text of the query.
            scores: one per document.
            truncated: one per document.
            parts: one per document, if there are any.
            document_ids: one per document, if there are any.
            top_k: how many of the best to keep; None keeps all.
        """
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_k]
        identifiers = [None] * len(scores) if document_ids is None else document_ids
        made_of: Sequence[Mapping[str, float]] = [{}] * len(scores) if parts is None else parts
        return cls(
            query,
            [
                RankedDocument(index, scores[index], rank, truncated[index], identifiers[index], made_of[index])
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


class Reranker(ABC):
    """Orders the documents that a first stage found for a query. Equal scores keep the first stage's order."""

    @abstractmethod
    def score_lists(
        self, lists: Iterable[tuple[str, Sequence[str]]], *, batch_tokens: int = BATCH_TOKENS
    ) -> Iterator[ListScores]:
        """Scores lists as they come, so that long work can be shown, saved and interrupted.

        Args:
            lists: query and documents of every list; read only as far as the next row of tokens needs.
            batch_tokens: see :meth:`rank_many`.

        Yields:
            The scores of every list, in order.
        """

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        *,
        document_ids: Sequence[str] | None = None,
    ) -> Ranking:
        """Ranks the documents of one query.

        Args:
            query: text of the query.
            documents: text of every document; an empty text is valid, an empty list gives an empty ranking.
            top_k: how many of the best documents to return; None returns all.
            document_ids: identifiers to repeat in the result, one per document.

        Raises:
            TypeError: a text is not a string.
            ValueError: ``top_k`` is negative, ``document_ids`` has another length than ``documents``, or the prompt
                does not fit the method's settings.
        """
        return self.rank_many(
            [query], [documents], top_k, document_ids=None if document_ids is None else [document_ids]
        )[0]

    def rank_many(
        self,
        queries: Sequence[str],
        documents: Sequence[Sequence[str]],
        top_k: int | None = None,
        *,
        document_ids: Sequence[Sequence[str]] | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[Ranking]:
        """Ranks the documents of several queries, several lists in one row of tokens where they fit.

        Lists never see each other: what shares a row does not change scores beyond rounding.

        Args:
            queries: text of every query.
            documents: the documents of every query.
            top_k: how many of the best documents to return per query; None returns all.
            document_ids: identifiers to repeat in the results, one per document of every query.
            batch_tokens: lists are packed, in the order given, while they stay within so many tokens. A longer list
                runs alone.

        Returns:
            One ranking per query, in the order of the queries.

        Raises:
            TypeError, ValueError: as :meth:`rank`, or the arguments differ in length.
        """
        if len(queries) != len(documents):
            raise ValueError(f"documents: expected one list for each of {len(queries)} queries, got {len(documents)}")
        if document_ids is not None and [len(ids) for ids in document_ids] != [len(texts) for texts in documents]:
            raise ValueError("document_ids: expected one for every document of every query")
        if top_k is not None and top_k < 0:
            raise ValueError(f"top_k: expected 0 or more, got {top_k}")
        scored = self.score_lists(zip(queries, documents, strict=True), batch_tokens=batch_tokens)
        return [
            Ranking.from_scores(query, *scores, document_ids=document_ids[index] if document_ids else None, top_k=top_k)
            for index, (query, scores) in enumerate(zip(queries, scored, strict=True))
        ]

    def predict(self, sentences: Sequence[Pair] | Pair, *, batch_tokens: int = BATCH_TOKENS) -> np.ndarray | np.float32:
        """Scores (query, document) pairs, as the ``CrossEncoder`` of sentence-transformers does.

        Pairs with the same query are scored together as one list, in the order in which they come, because most
        methods score a document relative to its list: give all candidates of a query in one call.

        Args:
            sentences: pairs of query and document, or one such pair.
            batch_tokens: see :meth:`rank_many`.

        Returns:
            float32 [number of pairs] in the order given; a single number for a single pair.
        """
        if len(sentences) == 2 and isinstance(sentences[0], str):
            single = cast(Pair, tuple(sentences))
            return self._predict_pairs([single], batch_tokens)[0]
        return self._predict_pairs(cast(Sequence[Pair], sentences), batch_tokens)

    def _predict_pairs(self, pairs: Sequence[Pair], batch_tokens: int) -> np.ndarray:
        places: dict[str, list[int]] = {}
        for place, (query, _) in enumerate(pairs):
            places.setdefault(query, []).append(place)
        lists = [(query, [pairs[place][1] for place in at]) for query, at in places.items()]
        result = np.empty(len(pairs), dtype=np.float32)
        for at, scored in zip(places.values(), self.score_lists(lists, batch_tokens=batch_tokens), strict=True):
            result[at] = scored.scores
        return result


def check_texts(query: str, documents: Sequence[str]) -> None:
    """Raises TypeError unless a query and its documents are strings."""
    if not isinstance(query, str):
        raise TypeError(f"query: expected a string, got {type(query).__name__}")
    if isinstance(documents, str):
        raise TypeError("documents: expected a sequence of strings, got a string")
    for index, text in enumerate(documents):
        if not isinstance(text, str):
            raise TypeError(f"documents[{index}]: expected a string, got {type(text).__name__}")


def check_batch_tokens(batch_tokens: int) -> None:
    """Raises ValueError unless rows may hold some tokens."""
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens: expected a positive integer, got {batch_tokens}")
