"""Training data: lists drawn from a task, the same on every machine and in every process, and lists that are ready."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from rankernel.run_files import FileError
from rankernel.training.data import (
    RankingDataset,
    RankingExample,
    RankingTask,
    judged_queries,
    read_lists,
    read_task,
    scores_of,
)

POOL = {f"d{i}": f"text {i}" for i in range(30)}
NAMES = {text: name for name, text in POOL.items()}
TASK = RankingTask(
    queries={"q0": "none relevant", "q1": "three relevant", "q2": "not judged", "q3": "no candidates"},
    documents=POOL,
    candidates={"q0": ["d1"], "q1": ["d5", "d2", "d9", "d0", "d7", "d8", "d3"], "q2": ["d1"]},
    qrels={"q0": {"d1": 0}, "q1": {"d0": 1, "d1": 3, "d2": 2, "d5": 0, "d9": -1}, "q3": {"d4": 1}},
)


def names_of(example: RankingExample) -> list[str]:
    return [NAMES[text] for text in example.documents]


def draws(dataset: RankingDataset, index: int, epochs: int = 40) -> list[RankingExample]:
    found = []
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        found.append(dataset[index])
    return found


@given(
    documents_per_list=st.integers(2, 40),
    hard_negatives=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    order=st.sampled_from(["shuffled", "run"]),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
def test_a_list_holds_relevant_documents_and_negatives_once_each(
    documents_per_list, hard_negatives, order, seed, epoch
):
    dataset = RankingDataset(
        TASK, documents_per_list=documents_per_list, hard_negatives=hard_negatives, order=order, seed=seed
    )
    shown = {"q1": {"d0": 1, "d1": 3, "d2": 2}, "q3": {"d4": 1}}
    if order == "run":  # a place behind the retrieved documents would give a relevant one away
        shown = {"q1": {"d0": 1, "d2": 2}}
    assert dataset.query_ids == list(shown)
    assert dataset.num_left_out == len(TASK.queries) - len(shown)
    dataset.set_epoch(epoch)
    for query, example in zip(dataset.query_ids, dataset, strict=False):
        names = names_of(example)
        assert example.query == TASK.queries[query]
        hidden = {name for name, grade in TASK.qrels[query].items() if grade > 0} - shown[query].keys()
        assert not hidden & set(names)
        assert len(set(names)) == len(names) == min(documents_per_list, len(POOL) - len(hidden))
        assert list(example.labels) == [float(shown[query].get(name, 0)) for name in names]
        relevant = sorted(shown[query].values(), reverse=True)
        assert sorted(filter(None, example.labels), reverse=True) == relevant[: documents_per_list - 1]
        assert example.teacher_scores is None


def test_all_hard_negatives_are_the_best_candidates():
    dataset = RankingDataset(TASK, documents_per_list=6)
    for example in draws(dataset, 0):
        assert set(names_of(example)) == {"d0", "d1", "d2", "d5", "d9", "d7"}
    # Five negatives are candidates; the rest is random.
    fillers = {name for example in draws(RankingDataset(TASK, documents_per_list=10), 0) for name in names_of(example)}
    assert fillers == set(POOL)


def test_a_share_of_hard_negatives_is_drawn_from_all_candidates():
    dataset = RankingDataset(TASK, documents_per_list=6, hard_negatives=0.5)
    candidates = {"d5", "d9", "d7", "d8", "d3"}
    counts = Counter(name for example in draws(dataset, 0, 400) for name in names_of(example))
    # Of 3 negatives 1.5 are candidates on average, and the random ones are too now and then.
    hard = sum(counts[name] for name in candidates) / 400
    assert 1.5 <= hard < 2.0
    assert max(counts[name] for name in candidates) < 1.5 * min(counts[name] for name in candidates)
    easy = RankingDataset(TASK, documents_per_list=4, hard_negatives=0.0)
    assert {name for example in draws(easy, 1, 100) for name in names_of(example)} == set(POOL)


def test_the_order_is_random_or_that_of_the_run():
    shuffled = RankingDataset(TASK, documents_per_list=8)
    first = Counter(names_of(example)[0] for example in draws(shuffled, 0, 400))
    assert len(first) >= 8
    assert max(first.values()) < 100
    ranks = {name: rank for rank, name in enumerate(TASK.candidates["q1"])}
    for example in draws(RankingDataset(TASK, documents_per_list=12, order="run"), 0):
        places = [ranks.get(name, math.inf) for name in names_of(example)]
        assert places == sorted(places)


def test_lists_depend_on_seed_epoch_and_index_alone():
    def lists(seed=0, epoch=0, touched=False):
        dataset = RankingDataset(TASK, documents_per_list=6, hard_negatives=0.5, seed=seed)
        if touched:
            draws(dataset, 1)
        dataset.set_epoch(epoch)
        return [names_of(dataset[index]) for index in range(len(dataset))]

    assert lists() == lists(touched=True)
    assert lists() != lists(epoch=1) != lists(seed=1) != lists()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_train_data as t;"
        "d = t.RankingDataset(t.TASK, documents_per_list=6, hard_negatives=0.5);"
        "print([t.names_of(d[i]) for i in range(len(d))])"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, __file__.rpartition("/")[0]], capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == str(lists())


def test_workers_that_persist_see_the_epoch():
    dataset = RankingDataset(TASK, documents_per_list=6, hard_negatives=0.5)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        seen.append([names_of(example) for example in loader])
        assert seen[epoch] == [names_of(dataset[index]) for index in range(2)]
    assert seen[0] != seen[1]


def test_documents_that_the_teacher_did_not_score_are_below_its_lowest():
    teacher = {"q1": {"d0": 5.0, "d2": 3.0, "d5": 4.0}, "q3": {"d4": 7.0}}
    dataset = RankingDataset(TASK, documents_per_list=6, teacher=teacher)
    for index, query in enumerate(dataset.query_ids):
        for name, score in zip(names_of(dataset[index]), dataset[index].teacher_scores, strict=True):
            assert score == teacher[query].get(name, {"q1": 2.0, "q3": 6.0}[query])
    assert scores_of({"a": 2.0, "b": 2.0}, "abc") == [2.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"documents_per_list": 1}, "documents_per_list: expected at least 2, got 1"),
        ({"hard_negatives": 1.5}, "hard_negatives: expected a share of 0 to 1, got 1.5"),
        ({"order": "random"}, "order: expected one of shuffled, run, got 'random'"),
        ({"teacher": {"q1": {"d1": 1.0}}}, "teacher: expected scores for every query with a list, got none for q3"),
        ({"task": RankingTask({"q": "a"}, POOL, {}, {"q": {"d1": 0}})}, "a query with a relevant document, got none"),
        (
            {"task": RankingTask({"q": "a"}, POOL, {}, {"q": {"x": 1}})},
            "relevant documents to be in the pool, got x of q",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes, fault):
    with pytest.raises(ValueError, match=fault):
        RankingDataset(**{"task": TASK, "documents_per_list": 4, **changes})


@pytest.fixture
def files(tmp_path):
    (tmp_path / "q.tsv").write_text("q1\tone\nq2\ttwo\nq3\tthree\n")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"id": f"d{i}", "text": f"t{i}"}) + "\n" for i in range(6)))
    (tmp_path / "bm25.trec").write_text("q1 Q0 d0 1 3 x\nq1 Q0 d1 2 4 x\nq1 Q0 d2 3 2 x\nq2 Q0 d3 1 1 x\n")
    (tmp_path / "qrels.txt").write_text("q1 0 d1 1\nq3 0 d5 1\nq9 0 d1 1\n")
    return [tmp_path / name for name in ("q.tsv", "d.jsonl", "qrels.txt", "bm25.trec")]


def test_a_task_is_read_from_files(files):
    task = read_task(*files)
    assert task.queries == {"q1": "one", "q2": "two", "q3": "three"}
    assert list(task.documents) == [f"d{i}" for i in range(6)]
    assert task.candidates == {"q1": ["d1", "d0", "d2"], "q2": ["d3"]}
    assert task.qrels == {"q1": {"d1": 1}, "q3": {"d5": 1}}
    shallow = read_task(*files, depth=2, whole_pool=False)
    assert shallow.candidates["q1"] == ["d1", "d0"]
    assert list(shallow.documents) == ["d0", "d1", "d3"]


def test_judged_queries_are_limited_at_random(files):
    task = read_task(*files)
    judged = judged_queries(task)
    assert judged.queries == {"q1": "one", "q3": "three"}
    assert judged.candidates == {"q1": ["d1", "d0", "d2"]}
    assert judged.qrels == task.qrels
    drawn = [judged_queries(task, 1, seed).queries.keys() for seed in range(8)]
    assert {*map(tuple, drawn)} == {("q1",), ("q3",)}
    assert drawn[0] == judged_queries(task, 1, 0).queries.keys()


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        (3, "q1 Q0 d0 1 3 x\nq7 Q0 d0 1 3 x\n", "bm25.trec:2: query q7 is not in "),
        (3, "q1 Q0 d0 1 3 x\nq1 Q0 d7 1 3 x\n", "bm25.trec:2: document d7 is not in "),
        (2, "q9 0 d1 1\n", "qrels.txt: no query of "),
    ],
)
def test_files_that_do_not_fit_together_are_one_line(files, file, content, fault):
    files[file].write_text(content)
    with pytest.raises(FileError) as error:
        read_task(*files)
    assert fault in str(error.value)


def test_ready_lists_are_read_in_file_order(tmp_path):
    lists = [
        {"query": "b", "documents": ["x", "y"], "labels": [0, 1.5], "teacher_scores": [-1, 2]},
        {"query": "a", "documents": ["z"], "labels": [1], "teacher_scores": [0]},
    ]
    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lists))
    assert read_lists(path) == [RankingExample(**row) for row in lists]
    path.write_text('{"query": "a", "documents": ["z"], "labels": [1]}\n')
    assert read_lists(path) == [RankingExample("a", ["z"], [1.0], None)]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("", "no lists in it"),
        ("[1]", "1: expected a JSON object"),
        ('{"documents": ["a"], "labels": [1]}', "1: expected a string as query"),
        ('{"query": "q", "documents": [], "labels": []}', "1: expected a list of strings as documents, at least one"),
        ('{"query": "q", "documents": ["a", 1], "labels": [1, 0]}', "1: expected a list of strings as documents"),
        ('{"query": "q", "documents": ["a"], "labels": [1, 2]}', "1: expected a list of 1 numbers as labels"),
        ('{"query": "q", "documents": ["a"], "labels": [NaN]}', "1: expected finite float32 numbers as labels"),
        ('{"query": "q", "documents": ["a"], "labels": [1e39]}', "1: expected finite float32 numbers as labels"),
        ('{"query": "q", "documents": ["a"], "labels": [true]}', "1: expected finite float32 numbers as labels"),
        ('{"query": "q", "documents": ["a"], "labels": [1], "teacher_scores": [1, 2]}', "1 numbers as teacher_scores"),
        ('{"query": "q", "documents": ["a"], "labels": [1], "label": 1}', "1: unknown entry 'label'"),
        ('{"query": "\\ud800", "documents": ["a"], "labels": [1]}', "1: expected text, got half a surrogate pair"),
    ],
)  # fmt: skip
def test_faults_of_ready_lists_are_one_line(tmp_path, line, fault):
    path = tmp_path / "lists.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(FileError, match=r"lists\.jsonl") as error:
        read_lists(path)
    assert fault in str(error.value)


def test_teacher_scores_are_in_all_lists_or_in_none(tmp_path):
    path = tmp_path / "lists.jsonl"
    row = {"query": "a", "documents": ["z"], "labels": [1]}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "teacher_scores": [1]}) + "\n")
    with pytest.raises(FileError, match=r"lists\.jsonl:2: expected teacher_scores in all lists or in none"):
        read_lists(path)
