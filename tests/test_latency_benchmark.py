"""Milliseconds per query: the benchmark runs, compares with the right thing, counts right, and can be drawn."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rankernel import backends
from rankernel.models import graphs
from test_benchmarks import BENCHMARKS, check_structure, measure_tiny, values

pytest.importorskip("transformers")
SCRIPT = BENCHMARKS.parent / "scripts/plot_latency.py"
SCORES = {"stock prefix cache", "attached", "attached early exit"}
GRAPH = "attached early exit CUDA graph"
OTHERS = {"stock dense prefill", "its matmuls alone"}


@pytest.fixture
def latency(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("cases.latency")
    monkeypatch.setattr(module, "_held", {})
    return module


def test_tiny_cases(tmp_path: Path) -> None:
    output, rows = measure_tiny(tmp_path, "--op", "latency", "--case", "tiny*", "--dtype", "bfloat16")
    check_structure(output, rows)
    matches = values(rows, "match")
    cases = ("tiny", "tiny-mistral")
    assert set(matches) == {(case, "bfloat16", name) for case in cases for name in SCORES | OTHERS}
    assert set(matches.values()) == {"1"}
    assert {row["peer"] for row in rows if row["metric"] == "speed_up"} == {"stock prefix cache"}
    for metric, name, peer in (
        ("over_matmuls", "attached early exit", "its matmuls alone"),
        ("over_early_exit", "stock dense prefill", "attached early exit"),
    ):
        assert ("tiny", "bfloat16", name) in values(rows, metric, peer=peer)


def test_rows_by_device_and_length(latency: Any) -> None:
    def rows(documents: int, device: str) -> set[str]:
        lengths = latency.Lengths(96, documents, 160, 48)
        problem = latency.problem(latency.DECODERS["mistral-7b"], lengths, device, torch.bfloat16)
        return {row.name for row in problem.implementations}

    assert {f"{name}-{documents}" for name in latency.DECODERS for documents in (10, 20, 50, 100, 200, 500)} < {
        case.name for case in latency.CASES
    }
    assert rows(200, "cpu") == SCORES | OTHERS
    assert rows(200, "cuda") == SCORES | OTHERS | {GRAPH}
    assert rows(500, "cuda") == SCORES | {GRAPH, "its matmuls alone"}


@torch.no_grad()
def test_graph_row(latency: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA graphs that runs again what was recorded."""

    def record(run: Any, device: torch.device, pool: Any) -> tuple[torch.Tensor, Any, Any]:
        scores = run()
        return scores, lambda: scores.copy_(run()), pool

    monkeypatch.setattr(graphs, "record", record)
    inputs = latency.Inputs(latency.Decoder("qwen3", latency.TINY, 64), latency.TINY_LIST, "cpu", torch.float32)
    call, exact = latency.graph_scores(inputs), latency.exact_scores(inputs)
    for _ in range(2):
        torch.testing.assert_close(call(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
@torch.no_grad()
def test_expected_scores_are_those_of_the_dense_mask(latency: Any, family: str) -> None:
    model = importlib.import_module("cases.model")
    lengths = latency.Lengths(7, 5, 6, 4)
    inputs = latency.Inputs(latency.Decoder(family, model.TINY, 64), lengths, "cpu", torch.float32)
    dense = model.Inputs((7, [6] * 5, 4), model.TINY, torch.float32)
    dense.stock = latency.stock(inputs.decoder, "cpu", torch.float32)
    for parameter in dense.stock.parameters():
        parameter.mul_(8)  # else the logits of so narrow a model hardly differ
    dense.input_ids = inputs.input_ids[None]
    exact, wanted = latency.exact_scores(inputs), model.stock_scores(dense, dtype=torch.float64)()
    assert wanted.std() > 0.1
    torch.testing.assert_close(exact, wanted, rtol=1e-6, atol=1e-6)
    causal = model.stock_scores(dense, causal=True, dtype=torch.float64)()
    assert (exact - causal).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
@torch.no_grad()
def test_matrix_products_are_those_of_early_exit(latency: Any, family: str) -> None:
    inputs = latency.Inputs(latency.Decoder(family, latency.TINY, 64), latency.TINY_LIST, "cpu", torch.float32)
    counts = []
    for build in (latency.early_exit_scores, latency.matmuls_alone):
        call = build(inputs)
        with FlopCounterMode(display=False) as counter, backends.use(backend="cpu"):
            call()
        of_ops = counter.get_flop_counts()["Global"]
        counts.append(of_ops.get(torch.ops.aten.mm, 0) + of_ops.get(torch.ops.aten.addmm, 0))
    assert counts == [inputs.matmul_flops] * 2


def test_models_share_weights_and_make_room_for_the_next(latency: Any) -> None:
    first, second = (latency.Decoder(family, latency.TINY, 64) for family in ("qwen3", "mistral"))
    inputs = latency.Inputs(first, latency.TINY_LIST, "cpu", torch.float32)
    stock, attached = latency.stock(first, "cpu", torch.float32), inputs.attached()
    assert all(one is other for one, other in zip(stock.parameters(), attached.parameters(), strict=True))
    assert stock.config._attn_implementation == "sdpa"
    wide = inputs.model(torch.float64)
    assert {parameter.dtype for parameter in stock.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float64}
    weight = weakref.ref(stock.embed_tokens.weight)
    del stock, attached, wide
    assert weight() is not None
    latency.stock(second, "cpu", torch.float32)
    assert weight() is None


def plot(tmp_path: Path, case: str, sizes: tuple[int, ...]) -> tuple[subprocess.CompletedProcess[str], Path]:
    table, chart = tmp_path / "rows.csv", tmp_path / "chart.png"
    machine = {"date": "2026-01-02T03:04:05+00:00", "device": "a GPU", "op": "latency", "dtype": "bfloat16"}
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*machine, "case", "implementation", "metric", "value"])
        writer.writeheader()
        for name in SCORES | OTHERS:
            for size in sizes[: -1 if "dense" in name else None]:
                for metric, seconds in (("p20", 0.9), ("median", 1.0), ("p80", 1.2), ("samples", 3)):
                    row = {"case": f"{case}-{size}", "implementation": name, "metric": metric, "value": seconds * size}
                    writer.writerow(machine | row)
    command = [sys.executable, str(SCRIPT), str(table), "--chart", str(chart)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120), chart


def test_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done, chart = plot(tmp_path, "mistral-7b", (10, 500))
    assert done.returncode == 0, done.stderr
    assert chart.read_bytes().startswith(b"\x89PNG")
    chart.unlink()
    done, chart = plot(tmp_path, "tiny", (10, 500))
    assert done.returncode == 1
    assert "expected bfloat16 measurements of latency/mistral-7b" in done.stderr
    assert not chart.exists()
