"""The files of a retrieval experiment: queries, documents, TREC runs and qrels, and how results get to disk.

A fault in an input is one line, ``path:line: what is wrong``, and an output is complete or absent.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class FileError(Exception):
    """A file that cannot be used.

    Attributes:
        path: the file.
        line: number of the line, from 1, or None where the fault is not in one line.
        fault: what is wrong.
    """

    def __init__(self, path: str | Path, line: int | None, fault: str) -> None:
        self.path, self.line, self.fault = str(path), line, fault
        super().__init__(f"{path}: {fault}" if line is None else f"{path}:{line}: {fault}")


class Candidate(NamedTuple):
    """One line of a first-stage run.

    Attributes:
        document_id: what was retrieved.
        score: the first stage's score.
        line: number of the line in the file, from 1.
    """

    document_id: str
    score: float
    line: int


@contextlib.contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(path, None, error.strerror or str(error)) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not blank.

    Lines end at a line feed only: texts may hold other characters that Python takes for the end of a line.
    """
    with _os_errors(path), path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise FileError(path, number, f"expected UTF-8, got byte 0x{line[error.start]:02x}") from None
            if text.strip():
                yield number, text


def _check_identifier(path: Path, number: int, what: str, identifier: object) -> str:
    if not isinstance(identifier, str) or identifier.split() != [identifier]:
        raise FileError(path, number, f"expected a {what} id, a string without white space, got {identifier!r}")
    return identifier


def read_queries(path: str | Path) -> dict[str, str]:
    """Reads lines ``query id<TAB>text``.

    Returns:
        Text of every query by query id, in file order.

    Raises:
        FileError: the file cannot be read, is empty, or has a line of another form or a second line for a query.
    """
    path = Path(path)
    queries: dict[str, str] = {}
    for number, line in _lines(path):
        fields = line.split("\t")
        if len(fields) != 2:
            raise FileError(path, number, f"expected 2 columns separated by a tab, id and text, got {len(fields)}")
        query_id = _check_identifier(path, number, "query", fields[0])
        if query_id in queries:
            raise FileError(path, number, f"query {query_id} is there twice")
        queries[query_id] = fields[1]
    if not queries:
        raise FileError(path, None, "no queries in it")
    return queries


def read_documents(path: str | Path, wanted: Collection[str] | None = None) -> dict[str, str]:
    """Reads a JSON object per line with ``id`` (or ``_id``), ``text`` (or ``contents``) and perhaps ``title``.

    Args:
        path: the file.
        wanted: ids of the documents to keep in memory; None keeps all.

    Returns:
        Text of every document by document id, in file order; a title comes first and is separated by a space.

    Raises:
        FileError: the file cannot be read, or has a line of another form or a second line for a document.
    """
    path = Path(path)
    documents: dict[str, str] = {}
    seen: set[str] = set()
    for number, row in json_objects(path):
        identifier = _entry(path, number, row, "id", "_id")
        text = _entry(path, number, row, "text", "contents")
        title = row.get("title") or ""
        if not isinstance(text, str) or not isinstance(title, str):
            raise FileError(path, number, "expected strings as text and title")
        document_id = _check_identifier(path, number, "document", identifier)
        if document_id in seen:
            raise FileError(path, number, f"document {document_id} is there twice")
        seen.add(document_id)
        if wanted is None or document_id in wanted:
            documents[document_id] = encodable(path, number, f"{title} {text}" if title else text)
    return documents


def json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number, from 1, and content of every line that is not blank.

    Raises:
        FileError: the file cannot be read, or has a line that is no JSON object.
    """
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise FileError(path, number, f"expected a JSON object, got {_shortened(line)} ({reason})") from None
        if not isinstance(row, dict):
            raise FileError(path, number, f"expected a JSON object, got {_shortened(line)}")
        yield number, row


def _entry(path: Path, number: int, row: dict[str, object], *names: str) -> object:
    for name in names:
        if name in row:
            return row[name]
    raise FileError(path, number, f"expected an entry {' or '.join(json.dumps(name) for name in names)}")


def encodable(path: Path, number: int, text: str) -> str:
    """The same text.

    Raises:
        FileError: it holds half a surrogate pair, as JSON can write it, which no tokenizer takes.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FileError(path, number, f"expected text, got half a surrogate pair, {text[error.start]!a}") from None
    return text


def _shortened(line: str) -> str:
    return repr(line if len(line) <= 40 else f"{line[:37]}...")


def read_run(path: str | Path) -> dict[str, list[Candidate]]:
    """Reads a TREC run, lines ``query id, Q0, document id, rank, score, tag``.

    Returns:
        Candidates of every query by query id, queries in file order, candidates by falling score as ``trec_eval``
        takes them; equal scores go by rank.

    Raises:
        FileError: the file cannot be read, is empty, or has a line of another form or a second line for a candidate.
    """
    path = Path(path)
    rows: dict[str, list[tuple[int, Candidate]]] = {}
    seen: set[tuple[str, str]] = set()
    for number, line in _lines(path):
        fields = line.split()
        if len(fields) != 6:
            raise FileError(path, number, f"expected 6 columns, got {len(fields)}")
        query_id, _, document_id, rank, score, _ = fields
        if (query_id, document_id) in seen:
            raise FileError(path, number, f"document {document_id} is there twice for query {query_id}")
        seen.add((query_id, document_id))
        candidate = Candidate(document_id, _number(path, number, score), number)
        rows.setdefault(query_id, []).append((_integer(path, number, "rank", rank), candidate))
    if not rows:
        raise FileError(path, None, "no candidates in it")
    return {
        query_id: [candidate for _, candidate in sorted(found, key=lambda row: (-row[1].score, row[0]))]
        for query_id, found in rows.items()
    }


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Reads TREC judgements, lines ``query id, iteration, document id, grade``.

    Returns:
        Grade by document id, by query id.

    Raises:
        FileError: the file cannot be read, is empty, or has a line of another form or a second line for a judgement.
    """
    path = Path(path)
    qrels: dict[str, dict[str, int]] = {}
    for number, line in _lines(path):
        fields = line.split()
        if len(fields) != 4:
            raise FileError(path, number, f"expected 4 columns, got {len(fields)}")
        query_id, _, document_id, grade = fields
        judged = qrels.setdefault(query_id, {})
        if document_id in judged:
            raise FileError(path, number, f"document {document_id} is there twice for query {query_id}")
        judged[document_id] = _integer(path, number, "grade", grade)
    if not qrels:
        raise FileError(path, None, "no judgements in it")
    return qrels


def _integer(path: Path, number: int, what: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise FileError(path, number, f"expected an integer as {what}, got {text!r}") from None


def _number(path: Path, number: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise FileError(path, number, f"expected a finite number as score, got {text!r}")
    return value


def read_candidates(path: str | Path, queries: Mapping[str, str], queries_file: Path) -> dict[str, list[Candidate]]:
    """:func:`read_run`, whose queries have to be among ``queries``.

    Raises:
        FileError: what :func:`read_run` refuses, or a query that is not in ``queries_file``.
    """
    candidates = read_run(path)
    for query, found in candidates.items():
        if query not in queries:
            raise FileError(path, min(candidate.line for candidate in found), f"query {query} is not in {queries_file}")
    return candidates


def check_documents(
    path: str | Path, candidates: Mapping[str, list[Candidate]], documents: Mapping[str, str], documents_file: Path
) -> None:
    """
    Raises:
        FileError: the run at ``path`` has a document that is not in ``documents_file``.
    """
    unknown = [row for found in candidates.values() for row in found if row.document_id not in documents]
    if unknown:
        first = min(unknown, key=lambda row: row.line)
        raise FileError(path, first.line, f"document {first.document_id} is not in {documents_file}")


def run_lines(query_id: str, ranked: Sequence[tuple[str, float]], tag: str = "rankernel") -> str:
    """Lines of a TREC run for one query.

    Evaluation tools sort by score in single precision and break ties by document id. So scores are written with all
    digits of single precision, and a score that is not below the one before is lowered to the next number below it:
    the order of the lines is the order that every tool sees.

    Args:
        query_id: the query.
        ranked: document id and score, best first.
        tag: name of the run.
    """
    lines, previous = [], np.float32(np.inf)
    for rank, (document_id, score) in enumerate(ranked, start=1):
        previous = min(np.float32(score), np.nextafter(previous, np.float32(-np.inf)))
        lines.append(f"{query_id} Q0 {document_id} {rank} {previous:.9g} {tag}\n")
    return "".join(lines)


def write_task(
    folder: Path,
    queries: Mapping[str, str],
    documents: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, int]],
    run: Mapping[str, Sequence[tuple[str, float]]],
) -> None:
    """Writes ``queries.tsv``, ``documents.jsonl``, ``qrels.txt`` and the first stage's ``bm25.trec``.

    Args:
        folder: made if it is not there.
        queries: text by query id.
        documents: text by document id.
        qrels: grade by document id, by query id.
        run: document id and score, best first, by query id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = {
        "queries.tsv": (f"{query}\t{text}\n" for query, text in queries.items()),
        "documents.jsonl": (json.dumps({"id": name, "text": text}) + "\n" for name, text in documents.items()),
        "qrels.txt": (f"{query} 0 {name} {grade}\n" for query, of in qrels.items() for name, grade in of.items()),
        "bm25.trec": (run_lines(query, ranked, tag="bm25") for query, ranked in run.items()),
    }
    for file, content in lines.items():
        write_atomically(folder / file, content)


def scores_in_order(orders: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """Scores by document id, by query id, that have the given orders, free of ties."""
    return {query: {name: -float(rank) for rank, name in enumerate(order)} for query, order in orders.items()}


def effectiveness(qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean nDCG@10 and MRR@10 over all judged queries, by ``ir-measures``.

    Args:
        qrels: grade by document id, by query id; a document is relevant to MRR from grade 1.
        run: score by document id, by query id; a query that is not there counts 0.

    Raises:
        ImportError: ``ir-measures`` is not installed.
    """
    try:
        import ir_measures
    except ImportError as error:
        raise ImportError('metrics need ir-measures: pip install "rankernel[cli]"') from error
    measures = {"nDCG@10": ir_measures.nDCG @ 10, "MRR@10": ir_measures.RR @ 10}
    means = ir_measures.calc_aggregate(list(measures.values()), qrels, run)
    return {name: float(means[measure]) for name, measure in measures.items()}


def write_atomically(path: str | Path, text: str | Iterable[str]) -> None:
    """Writes a text file that is complete or absent: beside its place first, then renamed.

    Raises:
        FileError: the file cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _os_errors(path):
            with beside.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines([text] if isinstance(text, str) else text)
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


class ResumableRun:
    """A TREC run written query by query to ``<output>.partial``, which becomes ``<output>`` when all are there.

    What was finished before an interruption stays, with the settings it was made with in ``<output>.partial.json``.

    Attributes:
        finished: ids of the queries that are in the file, in its order.

    Args:
        output: where the finished run goes.
        settings: whatever has to be the same for a run to be continued; strings and numbers by name.
        expected: how many lines each query gets, by query id, in the order of writing.
        resume: whether to continue what an interrupted run left.

    Raises:
        FileError: there is an unfinished run and ``resume`` is not asked for, it was made with other settings, or the
            files cannot be written.
    """

    def __init__(
        self, output: str | Path, settings: dict[str, str | int | None], expected: dict[str, int], resume: bool
    ) -> None:
        self.output = Path(output)
        self.partial = self.output.with_name(f"{self.output.name}.partial")
        self._settings_file = self.output.with_name(f"{self.output.name}.partial.json")
        self.finished: list[str] = []
        end = 0
        if self.partial.exists() and self.partial.stat().st_size:
            if not resume:
                raise FileError(self.partial, None, "an interrupted run; continue it with --resume or delete it")
            self._check_settings(settings)
            end = self._read_finished(expected)
        write_atomically(self._settings_file, json.dumps(settings, indent=1) + "\n")
        with _os_errors(self.partial):
            self._file = self.partial.open("r+b" if end else "wb")
            self._file.truncate(end)
            self._file.seek(end)

    def _check_settings(self, settings: dict[str, str | int | None]) -> None:
        with _os_errors(self._settings_file):
            text = self._settings_file.read_text(encoding="utf-8")
        try:
            before = json.loads(text)
        except json.JSONDecodeError:
            before = None
        if not isinstance(before, dict):
            raise FileError(self._settings_file, None, f"not the settings of a run; delete it and {self.partial}")
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise FileError(
                self.partial, None, f"made with another {' and another '.join(changed)}; delete it to start afresh"
            )

    def _read_finished(self, expected: dict[str, int]) -> int:
        """Takes over the queries that are complete; returns the length in bytes of their lines."""
        with _os_errors(self.partial):
            lines = self.partial.read_bytes().splitlines(keepends=True)
        end = position = 0
        for query_id, count in expected.items():
            found = lines[position : position + count]
            whole = [line for line in found if line.endswith(b"\n") and line.split()[:1] == [query_id.encode()]]
            if len(whole) < count:
                break
            end += sum(len(line) for line in found)
            position += count
            self.finished.append(query_id)
        return end

    def add(self, query_id: str, ranked: Sequence[tuple[str, float]]) -> None:
        """Writes one query's ranking, best first, through to the file."""
        with _os_errors(self.partial):
            self._file.write(run_lines(query_id, ranked).encode())
            self._file.flush()
        self.finished.append(query_id)

    def complete(self) -> None:
        """Puts the run in its place."""
        self.close()
        with _os_errors(self.output):
            self.partial.replace(self.output)
            self._settings_file.unlink(missing_ok=True)

    def close(self) -> None:
        """Leaves what is finished for a later call, or nothing where nothing is."""
        self._file.close()
        if self.partial.exists() and not self.finished:
            self.discard()

    def discard(self) -> None:
        """Leaves nothing."""
        self._file.close()
        self.partial.unlink(missing_ok=True)
        self._settings_file.unlink(missing_ok=True)
