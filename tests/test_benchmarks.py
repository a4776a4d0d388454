"""The benchmarks run and refuse to praise a wrong result. Nothing here looks at a time."""

from __future__ import annotations

import csv
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rankernel import BlockLayout

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
HEADER = {
    "date", "cpu", "cpus", "threads", "load", "kernels", "rankernel", "git", "torch", "python", "system", "command",
}  # fmt: skip
MEASURED = {"median", "p20", "p80", "first_call", "samples", "calls_per_sample"}
# Compilation takes most of a minute, so only the slow test below has it.
NOT_COMPILED = "rankernel,attached,SDPA,dense,blocks,PyTorch,formulation"
OTHER_MASK = "SDPA causal (other mask)"

Rows = list[dict[str, str]]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "run.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def measure_tiny(tmp_path: Path, *arguments: str) -> tuple[str, Rows]:
    path = tmp_path / "rows.csv"
    done = run("--threads", "1", "--csv", str(path), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    with path.open(newline="") as file:
        return done.stdout, list(csv.DictReader(file))


def values(rows: Rows, metric: str, **where: str) -> dict[tuple[str, str, str], str]:
    """Value of a metric by (case, dtype, implementation)."""
    return {
        (row["case"], row["dtype"], row["implementation"]): row["value"]
        for row in rows
        if row["metric"] == metric and all(row[name] == value for name, value in where.items())
    }


def check_structure(output: str, rows: Rows) -> None:
    """Every row has the header's fields, every measured row all numbers, and speed-ups only stand between matches."""
    assert "reproduce: python benchmarks/run.py" in output
    assert "kernels of block_attention: float32" in output
    assert not values(rows, "failed")
    assert rows[0].keys() > HEADER
    for row in rows:
        assert all(row[name] for name in HEADER), row
    measured = values(rows, "median").keys()
    for metric in MEASURED:
        assert values(rows, metric).keys() == measured
        assert all(float(value) > 0 for value in values(rows, metric).values())
    matches = values(rows, "match")
    for row in rows:
        if row["metric"] == "speed_up":
            for name in (row["implementation"], row["peer"]):
                assert matches[row["case"], row["dtype"], name] == "1"


def test_list_names_every_op_and_runs_nothing() -> None:
    done = run("--list")
    assert done.returncode == 0, done.stderr
    for text in (
        "block_attention/100-documents",
        "document_scores/",
        "candidate_logits/log-probs-32",
        "listwise_loss/",
        "lora_linear/2048x1024x1024-backward",
        "lora_training/4x512",
        "model/100-documents",
        "rerankers/pointwise-50",
        "FlexAttention compiled",
    ):
        assert text in done.stdout
    assert "median" not in done.stdout


def test_block_attention(tmp_path: Path) -> None:
    output, rows = measure_tiny(
        tmp_path, "--op", "block_attention", "--case", "tiny,tiny-backward,call-overhead", "--impl", NOT_COMPILED
    )
    check_structure(output, rows)
    matches = values(rows, "match", case="tiny")
    right = {"rankernel", "SDPA dense mask", "SDPA per document", "padded blocks (BlockRank)"}
    for dtype in ("float32", "bfloat16"):
        assert {name for _, other, name in matches if other == dtype} == right | {OTHER_MASK}
    assert {name for (_, _, name), match in matches.items() if match == "0"} == {OTHER_MASK}
    assert f"{OTHER_MASK}: no speed-up, its result is another one" in output
    assert set(values(rows, "match", case="tiny-backward").values()) == {"1"}
    assert ("call-overhead", "float32", "rankernel") in values(rows, "python_overhead", peer="rankernel._C alone")


def test_document_scores(tmp_path: Path) -> None:
    arguments = ("--op", "document_scores", "--case", "tiny-*", "--impl", NOT_COMPILED, "--dtype", "float16,float32")
    output, rows = measure_tiny(tmp_path, *arguments)
    check_structure(output, rows)
    assert set(values(rows, "match").values()) == {"1"}
    assert {(case, dtype) for case, dtype, _ in values(rows, "match")} == {
        (f"tiny-{op}{end}", dtype)
        for op in ("logsumexp", "mass")
        for end in ("", "-backward")
        for dtype in ("float16", "float32")
    }


def test_listwise_loss(tmp_path: Path) -> None:
    output, rows = measure_tiny(tmp_path, "--op", "listwise_loss", "--case", "tiny-*", "--impl", NOT_COMPILED)
    check_structure(output, rows)
    matches = values(rows, "match")
    assert set(matches.values()) == {"1"}
    kinds = ("ranknet", "ndcg-loss2pp", "listmle", "approx-ndcg", "neural-ndcg")
    assert {case for case, _, _ in matches} == {f"tiny-{kind}" for kind in kinds}
    names = {name for case, _, name in matches if case == "tiny-ranknet"}
    assert names == {"rankernel", "eager PyTorch", "allRank formulation", "sentence-transformers formulation"}


def test_pairs_of_graded_labels_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    inputs = importlib.import_module("cases.listwise_loss").Inputs
    for graded in (False, True):
        batch = inputs((3, 11), graded, torch.float32, "cpu")
        assert batch.pairs == int((batch.labels[:, :, None] > batch.labels[:, None, :]).sum())


def test_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    output, rows = measure_tiny(tmp_path, "--op", "model", "--case", "tiny*", "--dtype", "float32")
    check_structure(output, rows)
    wrong = {name for (_, _, name), match in values(rows, "match").items() if match == "0"}
    assert wrong == {f"stock {OTHER_MASK}"}
    assert ("tiny-scores", "float32", "attached early exit") in values(rows, "speed_up", peer="stock SDPA dense mask")
    assert ("tiny-step", "float32", "attached") in values(rows, "speed_up", peer="stock SDPA dense mask")


def test_candidate_logits(tmp_path: Path) -> None:
    output, rows = measure_tiny(tmp_path, "--op", "candidate_logits", "--case", "tiny*")
    check_structure(output, rows)
    matches = values(rows, "match")
    assert set(matches.values()) == {"1"}
    assert {name for case, dtype, name in matches if (case, dtype) == ("tiny-log-probs", "bfloat16")} == {
        "rankernel", "full logits and log_softmax", "full logits and float32 log_softmax", "torch linear_cross_entropy",
    }  # fmt: skip
    assert ("tiny", "float32", "rankernel") in values(rows, "over_gathered", peer="F.linear of gathered rows")


def test_lora_linear(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    output, rows = measure_tiny(
        tmp_path, "--op", "lora_linear", "--case", "tiny*", "--dtype", "float32", "--impl", "frozen,rankernel,PEFT"
    )
    check_structure(output, rows)
    matches = values(rows, "match")
    assert set(matches.values()) == {"1"}
    usual = {"frozen linear", "rankernel", "rankernel fuse_lora", "PEFT"}
    cases = ("tiny-forward", "tiny-backward", "tiny-dropout", "tiny-mixed", "tiny-qkv")
    for case in cases:
        more = {"rankernel one by one"} if case == "tiny-qkv" else set()
        assert {name for other, _, name in matches if other == case} == usual | more
        assert ("float32", "PEFT") in {key[1:] for key in values(rows, "overhead", peer="frozen linear", case=case)}


def test_lora_training(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    output, rows = measure_tiny(tmp_path, "--op", "lora_training", "--case", "tiny", "--dtype", "bfloat16")
    check_structure(output, rows)
    adapted = {f"{name}{end}" for name in ("rankernel fuse_lora", "PEFT") for end in ("", " bfloat16 adapters")}
    assert {name for _, _, name in values(rows, "match")} == {"frozen model"} | adapted
    assert set(values(rows, "match").values()) == {"1"}


def test_rerankers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    output, rows = measure_tiny(tmp_path, "--op", "rerankers", "--case", "tiny*", "--dtype", "float32")
    check_structure(output, rows)
    assert set(values(rows, "match").values()) == {"1"}
    assert "3 prompts of 103-162 tokens, 406 packed, 416 alone, 486 padded" in output


def test_isas_run_side_by_side(tmp_path: Path) -> None:
    arguments = ("--op", "document_scores", "--case", "tiny-mass", "--impl", "rankernel", "--dtype", "float32")
    _, rows = measure_tiny(tmp_path, *arguments, "--isa", "scalar")
    assert {(row["implementation"], row["isa"]) for row in rows} == {("rankernel [scalar]", "scalar")}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_peers(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    ops = "block_attention,document_scores,listwise_loss,lora_linear"
    cases = "tiny,tiny-logsumexp,tiny-mass,tiny-ranknet,tiny-backward"
    arguments = ("--op", ops, "--case", cases, "--impl", "compiled,rankernel")
    output, rows = measure_tiny(tmp_path, *arguments, "--dtype", "float32")
    check_structure(output, rows)
    assert set(values(rows, "match").values()) == {"1"}
    names = {name for _, _, name in values(rows, "match")}
    assert names == {"rankernel", "rankernel fuse_lora", "FlexAttention compiled", "the same compiled"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "attention"], "--op: expected some of block_attention"),
        (["--case", "nothing"], "no case matches nothing"),
        (["--dtype", "int8"], "--dtype: expected some of float32"),
        (["--isa", "neon"], "--isa: expected some of scalar"),
        pytest.param(
            ["--device", "cuda"],
            "--device: cuda is asked for, and PyTorch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
    ],
)
def test_unknown_selections_are_refused(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("measure")
    monkeypatch.setattr(module, "WARM_UP_SECONDS", 0.0)
    return module


def test_no_speed_up_without_a_match(measure: ModuleType) -> None:
    exact = torch.linspace(0, 1, 11, dtype=torch.float64)
    expected = measure.Expected(lambda: exact, lambda: exact + 1e-3)
    outputs = {
        "right": exact.float(),
        "as good as PyTorch allows": exact + 1.9e-3,
        "wrong": exact + 3e-3,
        "NaN": exact.where(exact > 0.5, float("nan")),
        "another shape": exact[:-1],
    }
    rows = [measure.Implementation(name, lambda out=out: lambda: out, expected) for name, out in outputs.items()]
    rows.append(measure.Implementation("no result", lambda: lambda: None))
    rows.append(measure.Implementation("broken", lambda: 1 / 0, expected))
    results = {result.implementation.name: result for result in measure.run(rows, seconds=0.01)}
    assert [name for name, result in results.items() if result.matches] == ["right", "as good as PyTorch allows"]
    assert results["broken"].failed == "ZeroDivisionError: division by zero"
    assert not results["broken"].samples
    for name in outputs:
        may = results[name].matches
        assert (measure.speed_up(results["right"], results[name]) is not None) == may
        assert (measure.speed_up(results[name], results["right"]) is not None) == may
    assert measure.speed_up(results["right"], results["no result"]) is None


def test_infinities_must_lie_where_expected(measure: ModuleType) -> None:
    exact = torch.tensor([0.0, float("-inf")], dtype=torch.float64)
    expected = measure.Expected(lambda: exact, lambda: exact)
    assert expected.error(torch.tensor([0.5, float("-inf")])) == 0.5
    assert expected.error(torch.tensor([0.0, -1e30])) == float("inf")
    assert not expected.error(torch.tensor([float("nan"), float("-inf")])) <= expected.allowed


def test_all_tensors_of_a_result_must_match(measure: ModuleType) -> None:
    exact = torch.zeros(3, dtype=torch.float64)
    expected = tuple(measure.Expected(lambda: exact, lambda off=off: exact + off) for off in (1e-3, 1.0))
    outputs = {
        "right": (exact + 1e-3, exact + 1.9),
        "first wrong": (exact + 3e-3, exact + 1.9),
        "second NaN": (exact + 1e-3, exact * float("nan")),
        "one missing": (exact,),
    }
    rows = [measure.Implementation(name, lambda out=out: lambda: out, expected) for name, out in outputs.items()]
    results = {result.implementation.name: result for result in measure.run(rows, seconds=0.01)}
    assert [name for name, result in results.items() if result.matches] == ["right"]
    assert (results["right"].error, results["first wrong"].error) == (1.9, 3e-3)  # the furthest off in its own measure


def test_findings(measure: ModuleType) -> None:
    implementation = measure.Implementation("any", lambda: lambda: None)
    of = measure.Result(implementation, samples=[3.0], peak_bytes=5)
    over = measure.Result(implementation, samples=[2.0], peak_bytes=7)
    unknown = measure.Result(implementation, samples=[2.0])
    found = {unit: measure.Finding("", "", "", "", unit).value(of, over) for unit in ("", "s", "%", "B")}
    assert found == {"": 1.5, "s": 1.0, "%": 50.0, "B": -2}
    assert measure.Finding("", "", "", "", "B").value(of, unknown) is None


def test_rounds_are_interleaved(measure: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MIN_SAMPLE_SECONDS", 0.0)  # one call a sample
    calls: list[str] = []
    rows = [measure.Implementation(name, lambda name=name: lambda: calls.append(name)) for name in "abc"]
    results = measure.run(rows, seconds=0.0)
    assert [len(result.samples) for result in results] == [measure.MIN_ROUNDS] * 3
    assert calls[-3 * measure.MIN_ROUNDS :] == ["a", "b", "c"] * measure.MIN_ROUNDS


def test_peak_memory_sees_a_temporary(measure: ModuleType) -> None:
    peak = measure.peak_memory(lambda: torch.ones(1 << 23).add(1)[:1].clone())
    if peak is None:
        pytest.skip("this system cannot reset its high-water mark")
    assert 2 * 32e6 < peak < 3 * 32e6 * 1.2


def test_useful_work_counts_the_visible_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    workloads = importlib.import_module("workloads")
    layout = BlockLayout.from_lengths([(5, [3, 0, 7], 4), (0, [2], 0)])
    assert workloads.visible_pairs(layout) == int(layout.dense_mask().sum())
    prefix, documents, tail = workloads.ranking_list(100)
    assert (prefix, len(documents), tail) == (64, 100, 48)
    assert 40 <= min(documents) <= max(documents) <= 160
    assert workloads.ranking_list(400)[1][:100] == documents
