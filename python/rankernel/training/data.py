"""What rankers are trained and validated on: a retrieval task, and labelled lists drawn from it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from rankernel import run_files
from rankernel.run_files import FileError

Order = Literal["shuffled", "run"]

LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class RankingExample:
    """One labelled list.

    Attributes:
        query: text of the query.
        documents: text of every document, in the order in which the prompt shows them.
        labels: relevance of every document, higher is better, 0 not relevant.
        teacher_scores: a teacher's score of every document, higher is better, or None.
    """

    query: str
    documents: Sequence[str]
    labels: Sequence[float]
    teacher_scores: Sequence[float] | None = None


@dataclass(frozen=True)
class RankingTask:
    """Queries with the first-stage candidates that are to be put in order.

    Attributes:
        queries: text by query id.
        documents: text by document id.
        candidates: document ids by query id, the first stage's best first.
        qrels: relevance grade by document id, by query id; what is not listed is not relevant.
    """

    queries: Mapping[str, str]
    documents: Mapping[str, str]
    candidates: Mapping[str, Sequence[str]]
    qrels: Mapping[str, Mapping[str, int]]


def read_task(
    queries: str | Path,
    documents: str | Path,
    qrels: str | Path,
    run: str | Path,
    *,
    depth: int | None = None,
    whole_pool: bool = True,
) -> RankingTask:
    """Reads a task from the files that ``rankernel rerank`` reads.

    Args:
        queries: lines of query id, tab, text.
        documents: a JSON object per line with ``id`` and ``text``.
        qrels: TREC judgements; those of other queries are passed over.
        run: first-stage candidates, a TREC run.
        depth: how many candidates of each query to keep; None keeps all.
        whole_pool: whether to keep the documents that are no candidate.

    Raises:
        FileError: a file cannot be read or has a line of another form, a query or document of the run is unknown, or no
            query is judged.
    """
    texts = run_files.read_queries(queries)
    found = {name: rows[:depth] for name, rows in run_files.read_candidates(run, texts, Path(queries)).items()}
    wanted = None if whole_pool else {row.document_id for rows in found.values() for row in rows}
    pool = run_files.read_documents(documents, wanted)
    run_files.check_documents(run, found, pool, Path(documents))
    judged = {name: grades for name, grades in run_files.read_qrels(qrels).items() if name in texts}
    if not judged:
        raise FileError(qrels, None, f"no query of {queries} is judged")
    candidates = {name: [row.document_id for row in rows] for name, rows in found.items()}
    return RankingTask(texts, pool, candidates, judged)


def judged_queries(task: RankingTask, limit: int | None = None, seed: int = 0) -> RankingTask:
    """The task with its judged queries alone, or ``limit`` of them that ``seed`` draws, in their old order."""
    names = [name for name in task.queries if name in task.qrels]
    if limit is not None and limit < len(names):
        drawn = set(random.Random(seed).sample(names, limit))
        names = [name for name in names if name in drawn]
    return RankingTask(
        {name: task.queries[name] for name in names},
        task.documents,
        {name: task.candidates[name] for name in names if name in task.candidates},
        {name: task.qrels[name] for name in names},
    )


class RankingDataset(torch.utils.data.Dataset[RankingExample]):
    """Labelled lists drawn from a task: one for each query that has a relevant document, drawn anew every epoch.

    A list holds the relevant documents, the best graded first to get a place, at most ``documents_per_list - 1`` of
    them; then hard negatives, taken from the query's candidates; then random documents of the pool. A document with a
    grade above 0 is never a negative. A list is a function of seed, epoch and index alone, so that any process can make
    any of them again.

    Attributes:
        query_ids: the query of every list.
        num_left_out: queries without a relevant document, which have no list.

    Args:
        task: where queries, documents, candidates and grades come from.
        documents_per_list: at least 2; lists are shorter only where the whole pool is.
        hard_negatives: share of the negatives that are candidates, 0 to 1. With 1 these are the first stage's best that
            fit, else they are drawn from all candidates; where there are too few, random documents take their place.
        order: ``"shuffled"``, as published, or ``"run"``, the first stage's, with random documents last. A relevant
            document that was not retrieved has no place in that order, which would give it away: it is left out, and so
            is a query without another.
        seed: of everything random.
        teacher: a teacher's scores by document id, by query id. A document that it did not score gets less than its
            lowest, by the mean distance of two successive scores.

    Raises:
        ValueError: a number out of range, a relevant document that is not in the pool, no query with a relevant
            document, or one that the teacher did not rank.
    """

    def __init__(
        self,
        task: RankingTask,
        *,
        documents_per_list: int,
        hard_negatives: float = 1.0,
        order: Order = "shuffled",
        seed: int = 0,
        teacher: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        if documents_per_list < 2:
            raise ValueError(f"documents_per_list: expected at least 2, got {documents_per_list}")
        if not 0 <= hard_negatives <= 1:
            raise ValueError(f"hard_negatives: expected a share of 0 to 1, got {hard_negatives}")
        if order not in get_args(Order):
            raise ValueError(f"order: expected one of {', '.join(get_args(Order))}, got {order!r}")
        self.task = task
        self.documents_per_list = documents_per_list
        self.hard_negatives = hard_negatives
        self.order = order
        self.seed = seed
        self.teacher = teacher
        self._relevant = {
            query: {name: grade for name, grade in task.qrels.get(query, {}).items() if grade > 0}
            for query in task.queries
        }
        self.query_ids = [query for query in task.queries if self._shown(query)]
        self.num_left_out = len(task.queries) - len(self.query_ids)
        self._check()
        self._pool = list(task.documents)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers of a loader see it change

    def _shown(self, query: str) -> list[str]:
        """The relevant documents that a list may hold."""
        relevant = list(self._relevant[query])
        if self.order == "shuffled":
            return relevant
        retrieved = set(self.task.candidates.get(query, []))
        return [name for name in relevant if name in retrieved]

    def _check(self) -> None:
        if not self.query_ids:
            raise ValueError("task: expected a query with a relevant document, got none")
        for query in self.query_ids:
            unknown = [name for name in self._relevant[query] if name not in self.task.documents]
            if unknown:
                raise ValueError(f"task: expected relevant documents to be in the pool, got {unknown[0]} of {query}")
            if self.teacher is not None and not self.teacher.get(query):
                raise ValueError(f"teacher: expected scores for every query with a list, got none for {query}")

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch's lists to draw, from 0."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.query_ids)

    def __getitem__(self, index: int) -> RankingExample:
        query = self.query_ids[index]
        # Seeding with a string hashes all of it, so neighbouring seeds, epochs and indices are unrelated.
        generator = random.Random(f"{self.seed} {int(self._epoch)} {index}")
        names = self._draw(query, generator)
        grades = self._relevant[query]
        return RankingExample(
            self.task.queries[query],
            [self.task.documents[name] for name in names],
            [float(grades.get(name, 0)) for name in names],
            None if self.teacher is None else scores_of(self.teacher[query], names),
        )

    def _draw(self, query: str, generator: random.Random) -> list[str]:
        grades = self._relevant[query]
        relevant = self._shown(query)
        generator.shuffle(relevant)
        relevant.sort(key=lambda name: -grades[name])
        chosen = relevant[: self.documents_per_list - 1]
        candidates = self.task.candidates.get(query, [])
        negatives = [name for name in candidates if name not in grades]
        places = self.documents_per_list - len(chosen)
        if self.hard_negatives == 1:
            chosen += negatives[:places]
        else:
            hard = int(self.hard_negatives * places + generator.random())  # the share is met on average
            chosen += generator.sample(negatives, min(hard, len(negatives)))
        taken = grades.keys() | set(chosen)
        missing = self.documents_per_list - len(chosen)
        drawn = generator.sample(self._pool, min(missing + len(taken), len(self._pool)))
        chosen += [name for name in drawn if name not in taken][:missing]
        generator.shuffle(chosen)
        if self.order == "run":
            ranks = {name: rank for rank, name in enumerate(candidates)}
            chosen.sort(key=lambda name: ranks.get(name, len(ranks)))
        return chosen


def scores_of(teacher: Mapping[str, float], names: Iterable[str]) -> list[float]:
    """A teacher's score of each document; see :class:`RankingDataset` for those that it did not score."""
    lowest, highest = min(teacher.values()), max(teacher.values())
    distance = (highest - lowest) / max(len(teacher) - 1, 1) or 1.0
    return [teacher.get(name, lowest - distance) for name in names]


def read_lists(path: str | Path) -> list[RankingExample]:
    """Reads lists that are ready: a JSON object per line with ``query``, ``documents``, ``labels``, ``teacher_scores``.

    Each of the last three has an entry per document; the last is there in all lists or in none.

    Returns:
        The lists in file order, a dataset as it is.

    Raises:
        FileError: the file cannot be read, is empty, or has a line of another form.
    """
    path = Path(path)
    lists: list[RankingExample] = []
    for number, row in run_files.json_objects(path):
        unknown = sorted(row.keys() - {"query", "documents", "labels", "teacher_scores"})
        if unknown:
            raise FileError(path, number, f"unknown entry {unknown[0]!r}")
        query, documents = row.get("query"), row.get("documents")
        if not isinstance(query, str):
            raise FileError(path, number, "expected a string as query")
        if not isinstance(documents, list) or not documents or not all(isinstance(text, str) for text in documents):
            raise FileError(path, number, "expected a list of strings as documents, at least one")
        for text in (query, *documents):
            run_files.encodable(path, number, text)
        labels = _numbers(path, number, "labels", row.get("labels"), len(documents))
        teacher = row.get("teacher_scores")
        scores = None if teacher is None else _numbers(path, number, "teacher_scores", teacher, len(documents))
        if lists and (scores is None) != (lists[0].teacher_scores is None):
            raise FileError(path, number, "expected teacher_scores in all lists or in none")
        lists.append(RankingExample(query, documents, labels, scores))
    if not lists:
        raise FileError(path, None, "no lists in it")
    return lists


def _numbers(path: Path, number: int, name: str, values: object, length: int) -> list[float]:
    if not isinstance(values, list) or len(values) != length:
        raise FileError(path, number, f"expected a list of {length} numbers as {name}, one per document")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
            raise FileError(path, number, f"expected finite float32 numbers as {name}, got {value!r}")
    return [float(value) for value in values]
