"""The benchmarks run and refuse to praise a wrong result. Nothing here looks at a time."""

from __future__ import annotations

import contextlib
import csv
import importlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

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
        "latency/tiny-mistral",
        "candidate_logits/log-probs-32",
        "listwise_loss/",
        "lora_linear/2048x1024x1024-backward",
        "lora_training/4x512",
        "model/100-documents",
        "rerankers/pointwise-50",
        "FlexAttention compiled",
    ):
        assert text in done.stdout
    assert "mistral-7b" not in done.stdout  # for GPUs
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


def sequence_by_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """``varlen_attn`` of PyTorch 2.11 for causal masks, as documented: they end in the bottom right corner."""
    assert window_size == (-1, 0)
    assert (max_q, max_k) == tuple(int(offsets.diff().max()) for offsets in (cu_seq_q, cu_seq_k))
    parts = []
    for rows, columns in zip(*(itertools.pairwise(offsets.tolist()) for offsets in (cu_seq_q, cu_seq_k)), strict=True):
        q, k, v = query[slice(*rows)], key[slice(*columns)], value[slice(*columns)]
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def published_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    num_blocks: int,
    block_size: int,
    sm_scale: float,
) -> tuple[torch.Tensor, None]:
    """What the kernel of BlockRank computes on [1, heads, blocks x width, D] and a mask [1, 1, blocks, width, width].

    The last row of a block's mask says which of its tokens exist, for blocks that see it.
    """
    assert attention_mask.shape == (1, 1, num_blocks, block_size, block_size)
    existing = attention_mask[0, 0, :, -1].flatten()
    block = torch.arange(num_blocks).repeat_interleave(block_size)
    seen = (block == 0) | (block[:, None] == num_blocks - 1)
    mask = torch.where(seen, existing, torch.finfo(existing.dtype).min)
    for number, own in enumerate(attention_mask[0, 0]):
        place = slice(number * block_size, (number + 1) * block_size)
        mask[place, place] = own
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=sm_scale), None


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a case module so that what it would run on a GPU runs on CPU tensors, eagerly."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)  # it refuses gradients
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", sequence_by_sequence)
    package, module = ModuleType("blockrank"), ModuleType("blockrank.blockrank_triton_kernel_attention")
    module.blockrank_attention_with_mask = published_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def load(op: str) -> ModuleType:
        cases = importlib.import_module(f"cases.{op}")
        monkeypatch.setattr(cases, "sdpa_kernel", lambda _: contextlib.nullcontext(), raising=False)
        return cases

    return load


def gpu_rows(cases: ModuleType, case: str, dtype: torch.dtype) -> Any:
    """What ``--device cuda`` runs, on CPU tensors."""
    (build,) = (one.build_on_gpu for one in cases.CASES if one.name == case)
    assert build.keywords["device"] == "cuda"
    rows = build(dtype, device="cpu").implementations
    assert {row.backend for row in rows if row.native_op} <= {"triton", "cuda"}
    return rows


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["tiny", "tiny-backward", "tiny-logsumexp", "tiny-mass-backward"])
def test_gpu_rows_are_right(
    on_cpu: Callable[[str], ModuleType], measure: ModuleType, case: str, dtype: torch.dtype
) -> None:
    op = "block_attention" if case in ("tiny", "tiny-backward") else "document_scores"
    rows = gpu_rows(on_cpu(op), case, dtype)
    wrong = set()
    with torch.no_grad():
        for row in rows:
            call = row.build()  # outside its context: rankernel's kernels for a GPU do not take CPU tensors
            call()
            if row.expected is not None:  # the second call: the first one must leave everything as it was
                error, allowed = measure._furthest_off(row.expected, call())
                wrong |= {row.name} if not error <= allowed else set()
    assert wrong == {row.name for row in rows if "(other mask)" in row.name}


def test_gpu_rows_fit_the_shape(on_cpu: Callable[[str], ModuleType]) -> None:
    def names(case: str, dtype: torch.dtype = torch.bfloat16) -> set[str]:
        rows = [row.name for row in gpu_rows(on_cpu("block_attention"), case, dtype)]
        assert len(set(rows)) == len(rows)
        return set(rows)

    causal = {f"SDPA causal {kernel} (other mask)" for kernel in ("flash", "cuDNN", "efficient")}
    flex = {"FlexAttention compiled 128", "FlexAttention compiled 64"}
    common = {"rankernel", "torch varlen", "SDPA per document", "torch.matmul 2048^3"} | flex
    everything = common | causal | {
        "FlexAttention mask building", "SDPA dense mask", "dense mask building", "padded blocks (BlockRank)",
        "published BlockRank kernel",
    }  # fmt: skip
    assert names("mistral-100x80-160") == everything
    assert names("mistral-100x80-160-backward") == common
    assert names("500-vs-100") == {"rankernel 100 documents", "rankernel 500 documents", "torch.matmul 2048^3"}
    quadratic = {"SDPA dense mask", "dense mask building"}
    assert everything - names("qwen3-0.6b-500x256-384") == quadratic | {"SDPA per document"}
    assert everything - names("mistral-100x256-384") == quadratic
    only_half = {"SDPA causal flash (other mask)", "SDPA causal cuDNN (other mask)", "torch varlen"}
    assert everything - names("mistral-10x160", torch.float32) == only_half


def test_what_attention_is_held_against_is_exact(on_cpu: Callable[[str], ModuleType]) -> None:
    cases = on_cpu("block_attention")
    inputs = cases.Inputs(cases.TINY, (4, 2, 16), torch.float32)
    leaves = [tensor.double().requires_grad_() for tensor in inputs.packed]
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in leaves)
    mask = inputs.layout.dense_mask()
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    assert inputs.expected.error(out.detach()) < 1e-12
    gradients = torch.autograd.grad(out, leaves, inputs.upstream.double())
    expected = gpu_rows(cases, "tiny-backward", torch.float32)[0].expected
    assert max(one.error(gradient) for one, gradient in zip(expected, gradients, strict=True)) < 1e-12


def test_block_mask_in_pieces_is_that_in_one(
    on_cpu: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = on_cpu("block_attention")
    layout = BlockLayout.from_lengths([(20, [30, 0, 64, 7], 9), (3, [50], 0)])
    whole = cases.build_block_mask(layout, 16)
    monkeypatch.setattr(cases, "MASK_PIECE", 3 * 16 * layout.num_tokens)
    pieces = cases.build_block_mask(layout, 16)
    assert pieces.shape == whole.shape
    for field in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        numbers = getattr(whole, field)
        assert torch.equal(getattr(pieces, field), numbers)
        blocks, wanted = (getattr(one, field.replace("num_blocks", "indices")) for one in (pieces, whole))
        used = torch.arange(wanted.shape[-1]) < numbers[..., None]
        assert torch.equal(blocks[used], wanted[used])


def test_varlen_attention_takes_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cases = importlib.import_module("cases.block_attention")
    inputs = cases.Inputs(cases.TINY, (4, 2, 16), torch.bfloat16, device="meta", backend="triton")
    assert cases.varlen(inputs)().shape == (inputs.layout.num_tokens, 4, 16)


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
        "rankernel", "full logits and log_softmax", "full logits and float32 log_softmax",
        *(["torch linear_cross_entropy"] if hasattr(torch.nn.functional, "linear_cross_entropy") else []),
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
