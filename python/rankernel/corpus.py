"""The bundled corpus of Python standard library docstrings, and its BM25 first stage.

``scripts/build_stdlib_corpus.py`` made the files; ``assets/stdlib/README.md`` describes them and
``assets/stdlib/LICENSE.txt`` holds the licence of the texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

STDLIB_DIRECTORY = Path(__file__).resolve().parent / "assets" / "stdlib"

Split = Literal["train", "validation", "heldout"]

_IDENTIFIER_BOUNDARY = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|_")


@dataclass(frozen=True)
class Corpus:
    """A retrieval task: texts by identifier, and graded judgements.

    Attributes:
        documents: text of every document of the pool, by document id, in file order.
        queries: text of every query, by query id, in file order.
        qrels: relevance grade by document id, by query id; a document that is not listed is not relevant.
    """

    documents: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Candidates:
    """First-stage result of one query.

    Attributes:
        document_ids: best first, at most ``depth`` of them.
        scores: the first stage's score of each, same order, higher is better.
    """

    document_ids: list[str]
    scores: list[float]

    @property
    def ranked(self) -> list[tuple[str, float]]:
        """Document id and score, best first."""
        return list(zip(self.document_ids, self.scores, strict=True))


def load_stdlib(split: Split, directory: Path = STDLIB_DIRECTORY) -> Corpus:
    """Load one split of the bundled corpus.

    The retrieval pool of a split is the documents of that split alone. Splits are made by top-level package, so no
    document that a ranker met in training is a candidate on held-out queries.

    Args:
        split: ``"train"``, ``"validation"`` or ``"heldout"``.
        directory: folder with ``documents.jsonl``, ``queries.jsonl`` and ``qrels.txt``.

    Raises:
        ValueError: ``split`` is none of the three.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}")
    documents = _read_texts(directory / "documents.jsonl", split)
    queries = _read_texts(directory / "queries.jsonl", split)
    qrels: dict[str, dict[str, int]] = {query_id: {} for query_id in queries}
    for line in (directory / "qrels.txt").read_text(encoding="utf-8").splitlines():
        query_id, _, document_id, grade = line.split()
        if query_id in qrels:
            qrels[query_id][document_id] = int(grade)
    return Corpus(documents, queries, qrels)


def _read_texts(path: Path, split: str) -> dict[str, str]:
    with path.open(encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines)
        return {row["id"]: row["text"] for row in rows if row["split"] == split}


def split_identifiers(text: str) -> str:
    """Separate the words of ``snake_case`` and ``camelCase`` names, which BM25 would take as one term each."""
    return _IDENTIFIER_BOUNDARY.sub(" ", text)


def bm25_candidates(queries: Mapping[str, str], documents: Mapping[str, str], depth: int = 50) -> dict[str, Candidates]:
    """Rank ``documents`` for every query with BM25 (``bm25s`` with its default parameters).

    Terms are lower-cased words of two characters or more without English stop words; names are split at underscores
    and capitals first. The result is the same on every run, and equal scores keep the order of ``documents``.

    Args:
        queries: text by query id.
        documents: text by document id.
        depth: length of the candidate list; shorter where there are fewer documents.

    Returns:
        The candidates of every query, by query id. A query without a known term gets the first documents, score 0.

    Raises:
        ValueError: ``depth`` is not positive.
        ImportError: ``bm25s`` is not installed.
    """
    if depth < 1:
        raise ValueError(f"depth must be positive, got {depth}")
    bm25s = _import_bm25s()
    document_ids = list(documents)
    query_terms = _terms(bm25s, queries.values())
    document_terms = _terms(bm25s, documents.values())
    # bm25s fails on a collection, and on a query, without a single term.
    retriever = bm25s.BM25() if any(document_terms) else None
    if retriever is not None:
        retriever.index(document_terms, show_progress=False)

    results: dict[str, Candidates] = {}
    for query_id, terms in zip(queries, query_terms, strict=True):
        scores = retriever.get_scores(terms) if retriever is not None and terms else np.zeros(len(document_ids))
        # A partial sort would leave equal scores in an order that depends on the depth.
        best = (-scores).argsort(kind="stable")[:depth]
        results[query_id] = Candidates([document_ids[i] for i in best], [float(scores[i]) for i in best])
    return results


def _terms(bm25s: Any, texts: Iterable[str]) -> list[list[str]]:
    split_texts = [split_identifiers(text) for text in texts]
    if not split_texts:
        return []
    terms: list[list[str]] = bm25s.tokenize(split_texts, stopwords="en", return_ids=False, show_progress=False)
    return terms


def _import_bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise ImportError('BM25 needs bm25s: pip install "rankernel[cli]"') from error
    return bm25s
