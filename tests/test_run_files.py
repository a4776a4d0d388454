from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankernel.run_files import (
    FileError,
    ResumableRun,
    effectiveness,
    read_documents,
    read_qrels,
    read_queries,
    read_run,
    run_lines,
    write_atomically,
)


@pytest.fixture
def written(tmp_path):
    def write(content: str | bytes) -> Path:
        path = tmp_path / "input"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_queries(written):
    path = written("\ufeffq1\tfirst\u2028text\r\n\nq2\t\nq3\tlast")
    assert list(read_queries(path).items()) == [("q1", "first\u2028text"), ("q2", ""), ("q3", "last")]


def test_documents_in_the_usual_forms(written):
    rows = [
        {"id": "a", "text": "one\ntwo", "split": "train"},
        {"_id": "b", "title": "Title", "text": "text"},
        {"id": "c", "contents": "\u2028"},
        {"_id": "d", "title": "", "text": ""},
    ]
    path = written("\n".join(json.dumps(row) for row in rows))
    assert read_documents(path) == {"a": "one\ntwo", "b": "Title text", "c": "\u2028", "d": ""}
    assert read_documents(path, {"b", "z"}) == {"b": "Title text"}


def test_run_is_sorted_by_score_then_rank(written):
    path = written("q2 Q0 a 1 0.5 t\nq1 Q0 x 1 1 t\nq2 Q0 b 3 2e0 t\nq2\tQ0\tc\t2\t2.0\tt\n")
    run = read_run(path)
    assert list(run) == ["q2", "q1"]
    assert [(row.document_id, row.score, row.line) for row in run["q2"]] == [("c", 2, 4), ("b", 2, 3), ("a", 0.5, 1)]


def test_qrels(written):
    assert read_qrels(written("q1 0 a 1\nq1 0 b 0\nq2 0 a -1\n")) == {"q1": {"a": 1, "b": 0}, "q2": {"a": -1}}


@pytest.mark.parametrize(
    ("read", "content", "fault"),
    [
        (read_queries, "", ": no queries in it"),
        (read_queries, "q1\ta\nq2 b\n", ":2: expected 2 columns separated by a tab, id and text, got 1"),
        (read_queries, "q1\ta\tb\n", ":1: expected 2 columns separated by a tab, id and text, got 3"),
        (read_queries, "q1\ta\n\nq1\tb\n", ":3: query q1 is there twice"),
        (read_queries, "q 1\ta\n", ":1: expected a query id, a string without white space, got 'q 1'"),
        (read_queries, "\ta\n", ":1: expected a query id, a string without white space, got ''"),
        (read_queries, b"q1\ta\nq2\t\xff\n", ":2: expected UTF-8, got byte 0xff"),
        (read_documents, '{"id": "a", "text": "b"}\n{"id": "c"\n', ":2: expected a JSON object, got"),
        (read_documents, "[1]\n", ":1: expected a JSON object, got '[1]'"),
        (read_documents, "[" * 100000, ":1: expected a JSON object, got '[[["),
        (read_documents, '{"text": "b"}\n', ':1: expected an entry "id" or "_id"'),
        (read_documents, '{"id": "b"}\n', ':1: expected an entry "text" or "contents"'),
        (read_documents, '{"id": 3, "text": "b"}\n', ":1: expected a document id, a string without white space, got 3"),
        (read_documents, '{"id": "a", "text": 3}\n', ":1: expected strings as text and title"),
        (read_documents, '{"id": "a", "text": "b", "title": ["c"]}\n', ":1: expected strings as text and title"),
        (read_documents, '{"id": "a", "text": "b"}\n' * 2, ":2: document a is there twice"),
        (read_documents, '{"id": "a", "text": "\\ud83d"}\n', ":1: expected text, got half a surrogate pair, '\\ud83d'"),
        (read_run, "", ": no candidates in it"),
        (read_run, "q1 Q0 a 1 0.5\n", ":1: expected 6 columns, got 5"),
        (read_run, "q1 Q0 a first 0.5 t\n", ":1: expected an integer as rank, got 'first'"),
        (read_run, "q1 Q0 a 1 high t\n", ":1: expected a finite number as score, got 'high'"),
        (read_run, "q1 Q0 a 1 nan t\n", ":1: expected a finite number as score, got 'nan'"),
        (read_run, "q1 Q0 a 1 2 t\nq1 Q0 a 2 1 t\n", ":2: document a is there twice for query q1"),
        (read_qrels, "", ": no judgements in it"),
        (read_qrels, "q1 a 1\n", ":1: expected 4 columns, got 3"),
        (read_qrels, "q1 0 a 0.5\n", ":1: expected an integer as grade, got '0.5'"),
        (read_qrels, "q1 0 a 1\nq1 0 a 1\n", ":2: document a is there twice for query q1"),
    ],
)
def test_a_fault_is_one_line_with_file_and_line(written, read, content, fault):
    path = written(content)
    with pytest.raises(FileError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}{fault}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [read_queries, read_documents, read_run, read_qrels])
def test_a_file_that_cannot_be_read_is_named(tmp_path, read):
    with pytest.raises(FileError, match=r"none: No such file or directory$"):
        read(tmp_path / "none")
    with pytest.raises(FileError, match=r"Is a directory$"):
        read(tmp_path)


@given(st.lists(st.floats(0, 1, width=32), max_size=30).map(lambda scores: sorted(scores, reverse=True)))
def test_written_scores_fall_strictly_and_stay_close(scores):
    rows = [line.split() for line in run_lines("q", [(f"d{i}", score) for i, score in enumerate(scores)]).splitlines()]
    assert [row[:4] for row in rows] == [["q", "Q0", f"d{i}", str(i + 1)] for i in range(len(scores))]
    read = np.array([row[4] for row in rows], dtype=np.float32)
    assert (np.diff(read) < 0).all()
    np.testing.assert_allclose(read, np.array(scores, dtype=np.float32), rtol=1e-5, atol=1e-40)


def test_distinct_scores_are_written_exactly():
    scores = [np.float32(1) / 3, np.nextafter(np.float32(1) / 3, np.float32(0)), np.float32(1e-12)]
    lines = run_lines("q", [("a", scores[0]), ("b", scores[1]), ("c", scores[2])], tag="mine").splitlines()
    assert [np.float32(line.split()[4]) for line in lines] == scores
    assert all(line.endswith(" mine") for line in lines)


def test_effectiveness_counts_missing_queries_as_zero():
    qrels = {"q1": {"a": 1}, "q2": {"b": 1}}
    assert effectiveness(qrels, {"q1": {"a": 2.0, "b": 1.0}}) == {"nDCG@10": 0.5, "MRR@10": 0.5}
    values = effectiveness(qrels, {"q1": {"a": 2.0}, "q2": {"a": 2.0, "b": 1.0}})
    assert values == pytest.approx({"nDCG@10": (1 + 1 / np.log2(3)) / 2, "MRR@10": 0.75})


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def lines():
        yield "one\n"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "out", lines())
    assert list(tmp_path.iterdir()) == []
    write_atomically(tmp_path / "out", "text\n")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out", "text\n")]
    with pytest.raises(FileError, match="No such file or directory"):
        write_atomically(tmp_path / "none" / "out", "text\n")


EXPECTED = {"q1": 2, "q2": 1, "q3": 2}
RANKED = {"q1": [("a", 0.75), ("b", 0.25)], "q2": [("a", 1.0)], "q3": [("c", 0.5), ("d", 0.5)]}
SETTINGS = {"--model": "m", "--top-k": None}


def start(tmp_path, resume, settings=SETTINGS):
    return ResumableRun(tmp_path / "out", settings, EXPECTED, resume)


def names(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def finish(tmp_path, run):
    for query_id in EXPECTED:
        if query_id not in run.finished:
            run.add(query_id, RANKED[query_id])
    run.complete()
    assert names(tmp_path) == ["out"]
    return (tmp_path / "out").read_bytes()


@pytest.mark.parametrize("cut", range(0, 95, 3))
def test_any_break_is_resumed_to_the_same_file(tmp_path, cut):
    whole = finish(tmp_path, start(tmp_path, resume=False))
    (tmp_path / "out").unlink()
    run = start(tmp_path, resume=True)
    run.add("q1", RANKED["q1"])
    run.close()
    assert names(tmp_path) == ["out.partial", "out.partial.json"]
    (tmp_path / "out.partial").write_bytes(whole[:cut])
    run = start(tmp_path, resume=True)
    lines = whole[:cut].count(b"\n")
    assert run.finished == [query for query, needed in (("q1", 2), ("q2", 3), ("q3", 5)) if lines >= needed]
    assert finish(tmp_path, run) == whole


def test_an_interrupted_run_is_not_overwritten_by_chance(tmp_path):
    run = start(tmp_path, resume=False)
    run.add("q1", RANKED["q1"])
    run.close()
    with pytest.raises(FileError, match=r"out\.partial: an interrupted run; continue it with --resume or delete it"):
        start(tmp_path, resume=False)
    with pytest.raises(FileError, match="made with another --model and another --top-k; delete it"):
        start(tmp_path, resume=True, settings={"--model": "n", "--top-k": 3})
    (tmp_path / "out.partial.json").write_text("3")
    with pytest.raises(FileError, match=r"out\.partial\.json: not the settings of a run"):
        start(tmp_path, resume=True)
    (tmp_path / "out.partial.json").unlink()
    with pytest.raises(FileError, match=r"out\.partial\.json: No such file or directory"):
        start(tmp_path, resume=True)
    assert len((tmp_path / "out.partial").read_text().splitlines()) == 2


def test_a_run_without_a_finished_query_leaves_nothing(tmp_path):
    start(tmp_path, resume=False).close()
    assert names(tmp_path) == []
    run = start(tmp_path, resume=False)
    run.add("q1", RANKED["q1"])
    run.discard()
    assert names(tmp_path) == []


def test_lines_of_another_run_are_not_taken_over(tmp_path):
    run = start(tmp_path, resume=False)
    run.add("q1", RANKED["q1"])
    run.close()
    path = tmp_path / "out.partial"
    path.write_text(path.read_text().replace("q1 Q0 b", "q9 Q0 b"))
    assert start(tmp_path, resume=True).finished == []
