"""``rankernel train``: configs, a whole run, and that a run that was killed goes on as if nothing had happened."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from rankernel import run_files
from rankernel.cli import app
from rankernel.rerankers import FIRST, BlockRank
from rankernel.run_files import FileError
from rankernel.training import checkpoints
from rankernel.training.config import (
    METHOD_SETTINGS,
    Config,
    LossSection,
    TrainLists,
    TrainTask,
    ValidationSection,
    read_config,
)
from rankernel.training.data import judged_queries, read_task
from tiny_ranker import save_tiny_ranker

WORDS = ["open", "read", "write", "file", "path", "close", "seek", "line", "text", "byte", "code", "name", "list"]
FILES = {"queries": "q.tsv", "documents": "d.jsonl", "qrels": "qrels.txt", "run": "bm25.trec"}
CONFIG: dict[str, Any] = {
    "model": "ranker",
    "output": "out",
    "seed": 5,
    "train": {**FILES, "documents_per_list": 4, "hard_negatives": 0.5},
    "validation": {**FILES, "limit": 6},
    # Random numbers are drawn in every step, by the adapters' dropout. 13 lists are epochs of 5 steps.
    "lora": {"r": 8, "lora_dropout": 0.2, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "training": {
        "learning_rate": 0.03,
        "max_steps": 12,
        "per_device_train_batch_size": 3,
        "logging_steps": 2,
        "save_steps": 5,
        "eval_steps": 4,
    },
}


def changed(key: str, value: Any) -> dict[str, Any]:
    """The config with another value of ``section.key``; None leaves it out."""
    config: dict[str, Any] = copy.deepcopy(CONFIG)
    *sections, name = key.split(".")
    place = config
    for section in sections:
        place = place.setdefault(section, {})
    place[name] = value
    if value is None:
        del place[name]
    return config


def write(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    """A ranker, and queries of two words of the one relevant document, which the first stage has in fourth place."""
    folder = tmp_path_factory.mktemp("task")
    save_tiny_ranker(folder / "ranker")
    generator = random.Random(0)
    documents = {f"d{i}": " ".join(generator.sample(WORDS, 4)) for i in range(30)}
    queries = {f"q{i}": " ".join(documents[f"d{i}"].split()[:2]) for i in range(14)}
    ranked = {}
    for index, query in enumerate(queries):
        others = generator.sample([name for name in documents if name != f"d{index}"], 7)
        ranked[query] = [*others[:3], f"d{index}", *others[3:]]
    (folder / "q.tsv").write_text("".join(f"{name}\t{text}\n" for name, text in queries.items()))
    (folder / "d.jsonl").write_text(
        "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in documents.items())
    )
    (folder / "qrels.txt").write_text("".join(f"q{i} 0 d{i} 1\n" for i in range(13)))
    (folder / "bm25.trec").write_text(
        "".join(
            run_files.run_lines(query, [(name, -float(rank)) for rank, name in enumerate(names)])
            for query, names in ranked.items()
        )
    )
    return folder


@pytest.fixture
def folder(task_files, tmp_path):
    shutil.copytree(task_files, tmp_path, dirs_exist_ok=True)
    return tmp_path


def train(path: Path, *more: str):
    return CliRunner().invoke(app, ["train", "--config", str(path), *more], env={"COLUMNS": "200"})


def train_in_a_process(path: Path, *more: str, prepare: str = "") -> subprocess.CompletedProcess[str]:
    """In one of its own: what other tests leave behind in this one can change the last bits of PyTorch's sums."""
    code = f"{prepare}\nimport sys\nfrom rankernel.cli import app\napp(sys.argv[1:])"
    command = [sys.executable, "-c", code, "train", "--config", str(path), *more]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})


def history(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in history(output) if "loss" in row]


@pytest.fixture(scope="module")
def whole(task_files, tmp_path_factory):
    """The folder of a run that nothing disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(task_files, folder, dirs_exist_ok=True)
    done = train_in_a_process(write(folder, CONFIG))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_leaves_everything_that_is_promised(whole):
    folder, printed = whole
    output = folder / "out"
    rows = history(output)
    evaluations = {row["step"]: row["eval_ndcg_at_10"] for row in rows if "eval_ndcg_at_10" in row}
    best = max(evaluations, key=lambda step: evaluations[step] if step else -1.0)
    assert list(evaluations) == [0, 4, 8, 12]
    assert 0 < best < 12  # so that the tests can tell the best from the last
    assert [step for step, _ in losses(output)] == [2, 4, 5, 6, 8, 10, 12]
    assert {"language_model", "ranking"} <= rows[1].keys()
    names = {path.name for path in output.iterdir()}
    kept = {f"checkpoint-{step}" for step in (best, 12)}
    assert names == kept | {"config.yaml", "curves.png", "history.jsonl", "model", "run.json", "tensorboard"}
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "config.yaml").read_bytes() == (folder / "x.yaml").read_bytes()
    assert list((output / "tensorboard").iterdir())

    assert "1 training queries have no relevant document and are left out" in printed
    # The relevant document in fourth place: 1 / log2(5).
    assert f"step 0: validation nDCG@10 {evaluations[0]:.4f}, first stage 0.4307" in printed
    assert f"step 12/12  loss {rows[-2]['loss']:.4f}" in printed
    card = (output / "model" / "README.md").read_text()
    assert f"| best, step {best} | {evaluations[best]:.4f} |" in card
    assert "| first stage | 0.4307 | 0.2500 |" in card
    assert "lora_dropout: 0.2" in card


def test_the_model_of_a_run_ranks_as_its_best_checkpoint_did(whole):
    output = whole[0] / "out"
    rows = {row["step"]: row for row in history(output) if "eval_ndcg_at_10" in row and row["step"]}
    ranker = BlockRank.from_pretrained(output / "model")
    config = read_config(whole[0] / "x.yaml")
    files = config.validation
    task = judged_queries(read_task(*(getattr(files, name) for name in FILES)), files.limit, config.seed)
    assert len(task.queries) == 6
    run = {}
    for query, names in task.candidates.items():
        ranking = ranker.rank(task.queries[query], [task.documents[name] for name in names], document_ids=names)
        run[query] = {row.document_id: row.score for row in ranking}
    found = run_files.effectiveness(task.qrels, run)["nDCG@10"]
    assert found == pytest.approx(max(row["eval_ndcg_at_10"] for row in rows.values()))


def test_a_run_is_not_started_over_nor_continued_where_it_is_finished(whole):
    folder, _ = whole
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}
    again = train(folder / "x.yaml")
    assert again.exit_code == 2
    assert again.stderr == f"{folder}/out: a run is there; continue it with --resume or name another output\n"
    resumed = train(folder / "x.yaml", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert resumed.stdout == f"{folder}/out: finished already, after 12 steps; nothing to do\n"
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}


def test_another_config_or_other_data_are_refused_by_name(whole, folder):
    shutil.copytree(whole[0] / "out", folder / "out")
    config = changed("training.learning_rate", 1e-3)
    config["seed"] = 1
    with (folder / "q.tsv").open("a") as file:
        file.write("q99\tone more\n")
    result = train(write(folder, config), "--resume")
    assert result.exit_code == 2
    another = " and another ".join(["seed", "train.queries", "training.learning_rate", "validation.queries"])
    assert result.stderr == f"{folder}/out: the run was made with another {another}\n"


KILLED_IN_A_SAVE = """
import os, signal, transformers

save = transformers.Trainer._save_rng_state
def save_and_die(self, output_dir):
    if self.state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, output_dir)
transformers.Trainer._save_rng_state = save_and_die
"""
INTERRUPTED = """
from rankernel.training.run import _Reporter

on_step_end = _Reporter.on_step_end
def interrupted(self, args, state, control, **kwargs):
    if state.global_step == 10:
        raise KeyboardInterrupt
    on_step_end(self, args, state, control, **kwargs)
_Reporter.on_step_end = interrupted
"""


def test_a_killed_and_an_interrupted_run_go_on_as_if_nothing_had_happened(whole, folder):
    path, output = write(folder, CONFIG), folder / "out"
    killed = train_in_a_process(path, prepare=KILLED_IN_A_SAVE)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (output / ".incomplete" / "checkpoint-8" / "optimizer.pt").exists()
    assert [step for step, _ in losses(output)][-1] == 8

    stopped = train_in_a_process(path, "--resume", prepare=INTERRUPTED)
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stderr.splitlines()[-1] == (
        f"interrupted after step 10; rankernel train --config {path} --resume continues from step 8"
    )
    assert "step 6/12" in stopped.stdout
    assert "step 5/12" not in stopped.stdout
    assert not any((output / ".incomplete").iterdir())

    done = train_in_a_process(path, "--resume")
    assert done.returncode == 0, done.stderr
    assert losses(output) == losses(whole[0] / "out")
    for name in ("model", "checkpoint-12"):
        for file in (output / name).glob("*.safetensors"):
            ours, theirs = load_file(file), load_file(whole[0] / "out" / name / file.name)
            assert all(tensor.equal(theirs[key]) for key, tensor in ours.items())
            assert ours.keys() == theirs.keys()


def test_a_run_killed_while_ending_is_ended(whole, folder):
    output = folder / "out"
    shutil.copytree(whole[0] / "out", output)
    state = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**state, "finished": False}))
    shutil.move(output / "model", output / ".incomplete")
    (output / "curves.png").unlink()
    result = train(write(folder, CONFIG), "--resume")
    assert result.exit_code == 0, result.output
    assert "step" not in result.stdout.replace("best, step", "").replace("last, step", "")
    assert (output / "model" / "README.md").read_text() == (whole[0] / "out" / "model" / "README.md").read_text()
    assert (output / "curves.png").exists()
    assert json.loads((output / "run.json").read_text())["finished"]


def test_a_finished_run_can_be_made_longer_but_not_shorter(whole, folder):
    output = folder / "out"
    shutil.copytree(whole[0] / "out", output)
    result = train(write(folder, changed("training.max_steps", 10)), "--resume")
    assert result.exit_code == 2
    assert result.stderr == f"{folder}/x.yaml:training: expected at least the 12 steps of the run, got 10\n"
    result = train(write(folder, changed("training.max_steps", 14)), "--resume")
    assert result.exit_code == 0, result.output
    before = losses(whole[0] / "out")
    assert losses(output)[: len(before)] == before
    assert [step for step, _ in losses(output)[len(before) :]] == [14]
    assert "| last, step 14 |" in (output / "model" / "README.md").read_text()


def test_all_weights_are_trained_on_ready_lists_in_file_order(folder):
    config = changed("lora", None)
    config["train"] = {"lists": "lists.jsonl", "shuffle": False}
    config["training"] = {"learning_rate": 0.03, "num_train_epochs": 1, "per_device_train_batch_size": 1}
    rows = [{"query": "open", "documents": ["open file", "sort"], "labels": [1, 0]}] * 2
    rows[1] = {"query": "sort", "documents": ["open file", "sort", "text"], "labels": [0, 1, 0]}
    (folder / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(write(folder, config))
    assert result.exit_code == 0, result.output
    forward = losses(folder / "out")
    assert [step for step, _ in forward] == [2]
    config["training"]["num_train_epochs"] = 2
    result = train(write(folder, config), "--resume")
    assert [step for step, _ in losses(folder / "out")] == [2, 4], result.output
    shutil.rmtree(folder / "out")
    (folder / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    config["training"]["num_train_epochs"] = 1
    assert train(write(folder, config)).exit_code == 0
    assert losses(folder / "out") != forward
    before, after = (load_file(folder / name / "model.safetensors") for name in ("ranker", "out/model"))
    assert all(not tensor.equal(after[name]) for name, tensor in before.items() if "proj" in name)
    BlockRank.from_pretrained(folder / "out" / "model").rank("open", ["open file", "sort"])


def test_first_is_trained_with_a_teacher(folder):
    (folder / "teacher.trec").write_text("".join(f"q{i} Q0 d{i} 1 2 x\nq{i} Q0 d20 2 1 x\n" for i in range(13)))
    config = changed("train.teacher", "teacher.trec") | {"method": "first", "settings": {"window": 6, "step": 3}}
    config["loss"] = {"teacher": "kl_distillation", "importance_weighted": True, "parameters": {"sigma": 2.0}}
    # What costs most here costs nothing new: bfloat16, checkpointed layers, accumulated rows of a number of tokens.
    config["training"] |= {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    config["training"] |= {"max_tokens": 4000, "max_steps": 2}
    result = train(write(folder, config))
    assert result.exit_code == 0, result.output
    rows = [row for row in history(folder / "out") if "loss" in row]
    assert all(row["teacher"] > 0 for row in rows)
    FIRST.from_pretrained(folder / "out" / "model").rank("open", ["open file", "sort"])
    config["settings"]["window"] = 3
    config["output"] = "other"
    result = train(write(folder, config))
    assert result.exit_code == 2
    assert result.stderr == f"{folder}/x.yaml: documents: expected 1 to 3, the window, got 4\n"


def test_a_missing_package_is_named_with_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = train(write(folder, CONFIG))
    assert result.exit_code == 2
    assert result.stderr == 'this needs matplotlib: pip install "rankernel[train]"\n'


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(folder):
    config = changed("training.learning_rate", 1e38)
    del config["lora"]
    result = train(write(folder, config))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"{folder}/out: the loss of step ")
    assert result.stderr.endswith(" is not finite\n")


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("output", None, "output: expected, but not there"),
        ("colour", "red", "colour: no such key"),
        ("method", "bm25", "method: expected 'blockrank' or 'first', got 'bm25'"),
        ("train.documents_per_list", 1, "train.documents_per_list: expected greater than or equal to 2, got 1"),
        ("train.runs", "x", "train.runs: no such key"),
        ("train.lists", "x", "train.documents: no such key"),
        ("validation.depth", "many", "validation.depth: expected a valid integer, unable to parse string as an"),
        ("settings.layer", 1.5, "settings.layer: expected a valid integer, got a number with a fractional part"),
        ("settings.prompt", {"prefix": "", "document": "{no}", "tail": ""}, "settings.prompt: document: expected no"),
        ("loss.ranking", "hinge", "loss.ranking: expected one of ranknet, "),
        ("loss.temperature", 0, "loss.temperature: expected greater than 0, got 0"),
        ("training.learning_rate", "fast", "training.learning_rate: expected a valid number, unable to parse"),
        ("training.learning_rates", 1, "training.learning_rates: no such key"),
        ("training.output_dir", "x", "training.output_dir: rankernel train sets this itself"),
        ("lora.rank", 4, "lora.rank: no such key"),
        ("lora.r", "four", "lora.r: expected a valid integer"),
    ],
)
def test_faults_of_a_config_are_one_line_that_names_the_key(folder, key, value, fault):
    path = write(folder, changed(key, value))
    result = train(path)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"{path}:{fault}")
    assert result.stderr.count("\n") == 1
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"model: [", ":1: expected the node content, but found '<stream end>'"),
        (b"model: a\nmodel: b\n", ":2: model is there twice"),
        (b"just text", ": expected "),
        (b"model: \xff", ": expected UTF-8"),
        (b"model: \x00", ": "),
    ],
)
def test_what_is_not_yaml_is_one_line(tmp_path, content, fault):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(FileError) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}{fault}")
    assert "\n" not in str(error.value)


def test_faults_of_what_a_config_names_are_one_line(folder):
    (folder / "lists.jsonl").write_text('{"query": "a", "documents": ["b"], "labels": ["c"]}\n')
    lists = changed("lora", None) | {"train": {"lists": "lists.jsonl"}}
    (folder / "teacher.trec").write_text("q0 Q0 d0 1 1 x\n")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").touch()
    for config, fault in (
        (lists, f"{folder}/lists.jsonl:1: expected finite float32 numbers as labels, got 'c'"),
        (changed("train.queries", "none.tsv"), f"{folder}/none.tsv: No such file or directory"),
        (changed("train.teacher", "teacher.trec"), f"{folder}/x.yaml:train: teacher: expected scores for every query"),
        (changed("train.teacher", "bm25.trec"), f"{folder}/x.yaml:loss.teacher: expected a kind of loss for the"),
        (changed("loss.teacher", "margin_mse"), f"{folder}/x.yaml:loss.teacher: expected a teacher in the section"),
        (changed("output", "full"), f"{folder}/full: expected a new or empty directory, or that of a run"),
        (changed("settings.layer", 9), f"{folder}/ranker: layer: expected one of the model's 3, 0 to 2, got 9"),
        (changed("lora.target_modules", ["w"]), f"{folder}/x.yaml: Target modules "),
    ):
        result = train(write(folder, config))
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith(fault)
        assert result.stderr.count("\n") == 1
        assert not (folder / "out").exists()


def test_numbers_of_a_config_are_what_people_mean(folder):
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump(CONFIG).replace("learning_rate: 0.03", "learning_rate: 1e-4"))
    config = read_config(path)
    assert config.training["learning_rate"] == 1e-4
    assert config.model == str(folder / "ranker")
    assert config.output == folder / "out"
    assert isinstance(config.train, TrainTask)
    assert config.train.queries == folder / "q.tsv"


def test_the_documented_example_is_a_config_and_every_key_is_documented(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "train.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "x.yaml").write_text(example)
    assert read_config(tmp_path / "x.yaml").validation.limit == 100
    table = text[text.index("## Keys") :]
    for model in (Config, TrainTask, TrainLists, ValidationSection, LossSection):
        for name in model.model_fields:
            assert re.search(rf"[`.]{name}[`.]", table), name
    for settings in METHOD_SETTINGS.values():
        for field in dataclasses.fields(settings):
            assert f"`{field.name}`" in table


class Killed(BaseException):
    """The process is gone: nothing after it runs."""


def test_checkpoints_are_whole_whenever_the_process_dies(tmp_path, monkeypatch):
    """Dies at every operation on the disk in turn; what looks like a checkpoint is always one."""

    def save(output: Path, step: int) -> None:
        written = output / checkpoints.INCOMPLETE / f"checkpoint-{step}"
        written.mkdir(parents=True)
        for name in ("model", "state"):
            (written / name).write_text(f"{step}")
        checkpoints.put_in_place(written, checkpoints.checkpoint_path(output, step))
        for old in checkpoints.checkpoint_steps(output)[:-2]:
            checkpoints.remove(checkpoints.checkpoint_path(output, old))

    remaining = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal remaining
            if remaining == 0:
                raise Killed
            remaining -= 1
            return function(*args, **kwargs)

        return call

    def slow_rmtree(path, ignore_errors=False):
        for inner in path.glob("*"):
            slow_rmtree(inner) if inner.is_dir() else inner.unlink()
        if path.exists():
            path.rmdir()

    monkeypatch.setattr(checkpoints.shutil, "rmtree", slow_rmtree)
    for name in ("rename", "unlink", "mkdir", "rmdir", "write_text"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    monkeypatch.setattr(checkpoints, "_to_disk", dying(checkpoints._to_disk))
    deaths = 0
    while True:
        output = tmp_path / str(deaths)
        remaining = -1
        output.mkdir()
        for step in (1, 2):
            save(output, step)
        remaining = deaths
        try:
            save(output, 3)
        except Killed:
            deaths += 1
        else:
            break
        finally:
            remaining = -1
        steps = checkpoints.checkpoint_steps(output)
        assert steps in ([1, 2], [1, 2, 3], [2, 3])
        for step in steps:
            files = {path.name: path.read_text() for path in checkpoints.checkpoint_path(output, step).iterdir()}
            assert files == {"model": f"{step}", "state": f"{step}"}
        checkpoints.remove_incomplete(output)
        assert {path.name for path in output.iterdir()} == {f"checkpoint-{step}" for step in steps}
    assert deaths > 10
    assert checkpoints.checkpoint_steps(output) == [2, 3]
