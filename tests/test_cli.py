from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from transformers import LlamaConfig
from typer.testing import CliRunner

from rankernel import backends, demo
from rankernel.cli import app
from rankernel.rerankers import METHODS, BlockRank
from rankernel.run_files import read_run
from tiny_ranker import save_tiny_ranker, word_tokenizer

TEXTS = {"d1": "open a file", "d2": "read", "d3": "the path of a file", "d4": "write", "d5": "q" * 200}
QUERIES = {"q1": "how to read a file", "q2": "path", "q3": "write", "q4": "no candidates"}
CANDIDATES = {"q2": ["d3", "d1"], "q1": ["d1", "d2", "d3", "d4", "d5"], "q3": ["d4"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_ranker(tmp_path_factory.mktemp("model"))


@pytest.fixture
def files(tmp_path, model):
    (tmp_path / "q.tsv").write_text("".join(f"{name}\t{text}\n" for name, text in QUERIES.items()))
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in TEXTS.items())
    )
    (tmp_path / "bm25.trec").write_text(
        "".join(
            f"{query} Q0 {name} {rank} {10 - rank} bm25\n"
            for query, names in CANDIDATES.items()
            for rank, name in enumerate(names, start=1)
        )
    )
    (tmp_path / "qrels.txt").write_text("q1 0 d2 1\nq2 0 d3 1\nq3 0 d9 1\n")
    return tmp_path


def rerank(files, model, *more):
    arguments = ["rerank", "--model", model, "--queries", files / "q.tsv", "--documents", files / "d.jsonl"]
    arguments += ["--run", files / "bm25.trec", "--output", files / "out.trec", *more]
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def left_behind(files):
    return sorted(path.name for path in files.glob("*out.trec*"))


def test_rerank_writes_the_run_of_the_reranker(files, model):
    result = rerank(files, model, "--qrels", files / "qrels.txt")
    assert result.exit_code == 0, result.stderr
    assert left_behind(files) == ["out.trec"]
    ranker = BlockRank.from_pretrained(model)
    run = read_run(files / "out.trec")
    assert list(run) == list(CANDIDATES)
    for query, names in CANDIDATES.items():
        expected = ranker.rank(QUERIES[query], [TEXTS[name] for name in names], document_ids=names)
        assert [row.document_id for row in run[query]] == [row.document_id for row in expected]
        assert [row.score for row in run[query]] == pytest.approx([row.score for row in expected], abs=2e-6)
    assert "1 documents were cut" in result.stdout
    assert "1 queries have no candidates" in result.stdout
    # Of three judged queries BM25 has one document first, one second and one not at all.
    assert re.search(r"first stage\s*│\s*0\.5436\s*│\s*0\.5000", result.stdout)
    assert re.search(r"reranked\s*│", result.stdout)
    assert result.stderr == ""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a language model and of a sequence classifier, with the tokens that all methods read."""
    directories = {}
    for name, options in (("CausalLM", {}), ("SequenceClassification", {"num_labels": 1})):
        config = LlamaConfig(
            vocab_size=330, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=3, initializer_range=0.3, **options,
        )  # fmt: skip
        torch.manual_seed(0)
        directories[name] = tmp_path_factory.mktemp(name)
        getattr(transformers, f"LlamaFor{name}")(config).save_pretrained(directories[name])
        word_tokenizer().save_pretrained(directories[name])
    return directories


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("blockrank", "qrhead")])
def test_every_method_ranks_and_explains(files, models, method):
    reranker, settings = METHODS[method]
    directory = models[getattr(reranker, "model_head", "CausalLM")]
    result = rerank(files, directory, "--method", method, "--explain")
    assert result.exit_code == 0, result.output
    ranker = reranker.from_pretrained(directory, **settings)
    run = read_run(files / "out.trec")
    for query, names in CANDIDATES.items():
        expected = ranker.rank(QUERIES[query], [TEXTS[name] for name in names], document_ids=names)
        assert [row.document_id for row in run[query]] == [row.document_id for row in expected]
        assert [row.score for row in run[query]] == pytest.approx([row.score for row in expected], abs=1e-4)
        table = result.stdout[result.stdout.index(f"{query}: {QUERIES[query]}") :]
        for name in expected[0].parts:
            assert name.split()[0] in table
        assert re.search(rf"1 │ {expected[0].document_id}\b", table)


def test_methods_refuse_what_does_not_fit_in_one_line(files, model, models):
    for arguments, fault in (
        ((model, "--method", "monot5"), "tokenizer: expected a single token for ' true'"),
        ((models["CausalLM"], "--method", "qrhead"), "heads: expected at least one"),
        ((models["CausalLM"], "--method", "first", "--layer", 1), "first has no scoring layer to choose"),
        ((models["CausalLM"], "--method", "none"), "expected one of blockrank"),
    ):
        result = rerank(files, *arguments)
        assert result.exit_code == 2, result.output
        assert fault in re.sub(r"[\s│]+", " ", result.stderr)


def test_top_k_layer_and_batch_tokens(files, model):
    assert rerank(files, model, "--top-k", 2, "--layer", 2, "--batch-tokens", 1).exit_code == 0
    ranker = BlockRank.from_pretrained(model, layer=2)
    names = CANDIDATES["q1"]
    expected = ranker.rank(QUERIES["q1"], [TEXTS[name] for name in names], 2, document_ids=names)
    run = read_run(files / "out.trec")
    assert [len(rows) for rows in run.values()] == [2, 2, 1]
    assert [row.document_id for row in run["q1"]] == [row.document_id for row in expected]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("q.tsv", "q1 no tab\n", "q.tsv:1: expected 2 columns"),
        ("q.tsv", "q1\ta\nq2\tb\n", "bm25.trec:8: query q3 is not in "),
        ("q.tsv", "q1\ta\nq2\tb\nq3\t" + "z" * 300 + "\n", "q.tsv: query: expected a prefix and a longest document"),
        ("q.tsv", None, "q.tsv: No such file or directory"),
        ("d.jsonl", '{"id": "d1", "text": "a"}\n{"id": 2}\n', 'd.jsonl:2: expected an entry "text"'),
        ("d.jsonl", '{"id": "d3", "text": "a"}\n', "bm25.trec:2: document d1 is not in "),
        ("bm25.trec", "q1 Q0 d1 1 x bm25\n", "bm25.trec:1: expected a finite number"),
        ("qrels.txt", "q1 0 d1 yes\n", "qrels.txt:1: expected an integer as grade"),
    ],
)
def test_a_bad_file_is_one_line_and_leaves_no_output(files, model, name, content, fault):
    if content is None:
        (files / name).unlink()
    else:
        (files / name).write_text(content)
    result = rerank(files, model, "--qrels", files / "qrels.txt", "--batch-tokens", 1)
    assert result.exit_code == 2
    assert result.stderr.startswith(str(files / fault))
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert left_behind(files) == []


def test_a_bad_model_or_output_is_one_line(files, model, tmp_path):
    for result, fault in (
        (rerank(files, tmp_path / "none"), f"{tmp_path}/none: no such directory"),
        (rerank(files, tmp_path), f"{tmp_path}: "),
        (rerank(files, model, "--layer", 3), f"{model}: layer: expected one of the model's 3, 0 to 2, got 3"),
        (rerank(files, model, "--output", tmp_path / "none" / "out.trec"), f"{tmp_path}/none/"),
        (rerank(files, model, "--output", tmp_path), f"{tmp_path}: "),
    ):
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith(fault)
        assert result.stderr.count("\n") == 1
        assert left_behind(files) == []


def test_an_interrupted_run_is_resumed(files, model, monkeypatch):
    assert rerank(files, model).exit_code == 0
    whole = (files / "out.trec").read_bytes()
    (files / "out.trec").unlink()
    score_lists, ranked = BlockRank.score_lists, []

    def interrupted(self, lists, *, batch_tokens):
        yield next(score_lists(self, lists, batch_tokens=1))
        raise KeyboardInterrupt

    def counted(self, lists, *, batch_tokens):
        for scored in score_lists(self, lists, batch_tokens=batch_tokens):
            ranked.append(scored)
            yield scored

    monkeypatch.setattr(BlockRank, "score_lists", interrupted)
    result = rerank(files, model)
    assert result.exit_code == 130
    assert result.stderr == f"interrupted: 1 of 3 queries are in {files}/out.trec.partial; --resume continues\n"
    assert left_behind(files) == ["out.trec.partial", "out.trec.partial.json"]
    assert rerank(files, model).exit_code == 2
    changed = rerank(files, model, "--resume", "--layer", 2)
    assert changed.exit_code == 2
    assert "made with another --layer" in changed.stderr

    monkeypatch.setattr(BlockRank, "score_lists", counted)
    result = rerank(files, model, "--resume")
    assert result.exit_code == 0
    assert "3 queries, 1 of them from before" in result.stdout
    assert len(ranked) == 2
    assert left_behind(files) == ["out.trec"]
    run = read_run(files / "out.trec")
    (files / "out.trec").write_bytes(whole)
    for query, rows in read_run(files / "out.trec").items():
        assert [row.document_id for row in run[query]] == [row.document_id for row in rows]
        assert [row.score for row in run[query]] == pytest.approx([row.score for row in rows], abs=2e-6)


def test_info_names_every_implementation(monkeypatch):
    monkeypatch.setattr("rankernel.cli._out.width", 200)
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    for row in backends.table():
        assert row.name in result.stdout
        assert row.why_not in result.stdout
    assert re.search(r"lib[gi]?omp", result.stdout)


def test_missing_packages_are_named_with_the_extra():
    code = "import sys; sys.modules['typer'] = None; import rankernel.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == 'the command line needs typer: pip install "rankernel[cli]"\n'


def test_a_package_missing_later_is_named_too(files, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    result = rerank(files, model, "--qrels", files / "qrels.txt")
    assert result.exit_code == 2
    assert result.stderr == 'metrics need ir-measures: pip install "rankernel[cli]"\n'
    assert left_behind(files) == []


def test_demo_shows_everything_and_writes_what_reranks(tmp_path, model, monkeypatch):
    console = Console(record=True, width=100, file=open(tmp_path / "shown", "w"))  # noqa: SIM115
    monkeypatch.setattr(demo, "TIMED_QUERIES", 1)
    output = tmp_path / "demo_output"
    demo.run_demo(console, 4, ranker=model, output=output, sizes=(2, 4))
    console.file.close()
    shown = (tmp_path / "shown").read_text()
    for part in ("shuffled", "BM25", "nDCG@10", "MRR@10", "stock, all layers", "4 held-out queries", " MB"):
        assert part in shown
    difference = re.search(r"largest score difference between them: (\S+)", shown)
    assert difference is not None
    assert float(difference[1]) < 1e-5
    assert (output / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_run(output / "run.trec")) == 4

    command = re.search(r"^rankernel (rerank .*)$", shown, re.MULTILINE)
    assert command is not None
    result = CliRunner().invoke(app, command[1].split())
    assert result.exit_code == 0, result.stderr
    for query, rows in read_run(output / "out.trec").items():
        expected = read_run(output / "run.trec")[query]
        assert [row.document_id for row in rows][:3] == [row.document_id for row in expected][:3]


def test_demo_without_its_model_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.run_demo, "__kwdefaults__", {**demo.run_demo.__kwdefaults__, "ranker": Path("nowhere")})
    result = CliRunner().invoke(app, ["demo", "--queries", "1"])
    assert result.exit_code == 2
    assert result.stderr == "nowhere: the bundled model is not there\n"
