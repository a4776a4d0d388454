"""candidate_logits: against float64 on random problems, every instruction set and dtype, and its gradients."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from attention_cases import DTYPES, assert_close
from rankernel import backends, candidate_logits, reference

OP = importlib.import_module("rankernel.ops.candidate_logits")


@dataclass
class Problem:
    """Float64 inputs that every dtype and instruction set is tried on."""

    hidden: torch.Tensor
    weight: torch.Tensor
    candidates: torch.Tensor
    bias: torch.Tensor | None
    padding: int
    options: dict[str, object]

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """The same values ``padding`` elements apart, with NaN between them."""
        padded = F.pad(x, (self.padding // 2, self.padding - self.padding // 2), value=float("nan"))
        return padded[:, self.padding // 2 :][:, : x.shape[1]]

    def inputs(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.rows(self.hidden.to(dtype)), self.rows(self.weight.to(dtype)), self.candidates

    def keywords(self, dtype: torch.dtype) -> dict[str, object]:
        return self.options | {"bias": None if self.bias is None else self.bias.to(dtype)}


def random_problem(
    num_rows: int, vocabulary: int, size: int, num_candidates: int, *, padding: int = 0, seed: int = 0,
    per_row: bool = False, bias: bool = False, **options: object,
) -> Problem:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, size, generator=generator, dtype=torch.float64) for n in (num_rows, vocabulary))
    shape = (num_rows, num_candidates) if per_row else (num_candidates,)
    candidates = torch.randint(vocabulary, shape, generator=generator)
    shift = torch.randn(vocabulary, generator=generator, dtype=torch.float64) if bias else None
    return Problem(hidden, weight * max(size, 1) ** -0.5, candidates, shift, padding, options)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Sizes around those of tiles, blocks and parts; strided rows, repeated candidates of any dtype, every option."""
    problem = random_problem(
        draw(st.sampled_from([0, 1, 2, 3, 4, 5, 31, 32, 33, 70])),
        draw(st.one_of(st.integers(1, 130), st.sampled_from([511, 512, 513, 576, 577, 1024, 1025, 3000]))),
        draw(st.one_of(st.integers(0, 70), st.sampled_from([96, 100, 127, 256, 257, 300]))),
        draw(st.sampled_from([0, 1, 2, 3, 4, 5, 17, 40, 64, 65])),
        padding=draw(st.sampled_from([0, 3])),
        seed=draw(st.integers(0, 2**31)),
        per_row=draw(st.booleans()),
        bias=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 0.25, -3.0])),
        softcap=draw(st.sampled_from([None, None, 2.0])),
        log_probs=draw(st.booleans()),
    )
    dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8]))
    if dtype == torch.uint8:
        problem.candidates %= 256
    problem.candidates = problem.candidates.to(dtype)
    return problem


@pytest.mark.usefixtures("poisoned_memory")
@settings(max_examples=60)
@given(problems())
def test_every_isa_and_dtype(problem: Problem) -> None:
    for dtype in DTYPES:
        inputs, keywords = problem.inputs(dtype), problem.keywords(dtype)
        wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in keywords.items()}
        truth = reference.candidate_logits(*(x.double() for x in inputs[:2]), inputs[2], **wide)
        eager = reference.candidate_logits(*inputs, **keywords)
        for isa in backends.available_isas():
            with backends.use(backend="cpu", isa=isa):
                ours = candidate_logits(*inputs, **keywords)
            assert ours.dtype == torch.float32
            assert_close(ours, eager, truth, f"{isa} {dtype}")
        with backends.use(backend="reference"):
            assert_close(candidate_logits(*inputs, **keywords), eager, truth, "reference")


def in_dtype(
    hidden: torch.Tensor, weight: torch.Tensor, candidates: torch.Tensor, *, bias: torch.Tensor | None = None,
    scale: float = 1.0, softcap: float | None = None, log_probs: bool = False,
) -> torch.Tensor:  # fmt: skip
    """What models do: the logits of the vocabulary in the dtype of the weights, then float32."""
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if log_probs:
        logits = logits.log_softmax(-1)
    return logits.gather(1, candidates.expand(len(hidden), candidates.shape[-1]))


def gradients(function: object, problem: Problem, dtype: torch.dtype, **more: object) -> list[torch.Tensor]:
    """Of hidden, weight and bias, for a random gradient of the result. The leaves hold what bfloat16 can."""
    hidden, weight = (problem.rows(x.bfloat16().to(dtype)) for x in (problem.hidden, problem.weight))
    bias = None if problem.bias is None else problem.bias.bfloat16().to(dtype)
    leaves = [None if x is None else x.requires_grad_() for x in (hidden, weight, bias)]
    out = function(*leaves[:2], problem.candidates, bias=leaves[2], **problem.options, **more)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).float()
    return list(torch.autograd.grad(out, [x for x in leaves if x is not None], grad.to(out.dtype)))


GRADIENTS = [
    {"bias": True, "softcap": 2.0, "scale": 0.5},
    {"per_row": True},
    {"per_row": True, "bias": True},
    {"bias": True, "log_probs": True, "softcap": 2.0},
    {"per_row": True, "log_probs": True, "scale": -2.0},
]


@pytest.mark.parametrize("options", GRADIENTS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("chunk", [8192, 50])
def test_gradients(isa: str, options: dict[str, object], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OP, "_CHUNK", chunk)
    monkeypatch.setattr(OP, "_CHUNK_ELEMENTS", 40 * chunk)
    problem = random_problem(9, 130, 45, 6, padding=3, **options)
    truth = gradients(reference.candidate_logits, problem, torch.float64)
    for dtype in DTYPES:
        eager = gradients(in_dtype, problem, dtype)
        with backends.use(backend="cpu"):
            ours = gradients(candidate_logits, problem, dtype)
        with backends.use(backend="reference"):
            fallback = gradients(candidate_logits, problem, dtype)
        assert len(truth) == 2 + ("bias" in options)
        for name, *compared in zip(("hidden", "weight", "bias"), eager, truth, ours, fallback, strict=False):
            of_eager, of_truth, of_ours, of_fallback = compared
            assert of_ours.dtype == of_fallback.dtype == dtype
            assert_close(of_ours, of_eager, of_truth, f"{name} {dtype}")
            assert_close(of_fallback, of_eager, of_truth, f"reference: {name} {dtype}")


@pytest.mark.parametrize("options", GRADIENTS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("chunk", [8192, 5])
def test_gradcheck(options: dict[str, object], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OP, "_CHUNK", chunk)
    monkeypatch.setattr(OP, "_CHUNK_ELEMENTS", 10 * chunk)
    problem = random_problem(3, 12, 5, 4, **options)
    leaves = [x.requires_grad_() for x in (problem.hidden, problem.weight, problem.bias) if x is not None]

    def function(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return candidate_logits(hidden, weight, problem.candidates, bias=bias, **problem.options)

    with backends.use(backend="reference"):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("per_row", [False, True])
def test_sparse_gradient(isa: str, per_row: bool) -> None:
    problem = random_problem(5, 300, 40, 8, per_row=per_row, bias=True, softcap=3.0)
    problem.candidates[..., 3] = problem.candidates[..., 1]
    for dtype in DTYPES:
        dense = gradients(candidate_logits, problem, dtype)
        sparse = gradients(candidate_logits, problem, dtype, sparse_grad=True)
        assert torch.equal(sparse[0], dense[0])
        assert torch.equal(sparse[2], dense[2])
        assert sparse[1].is_sparse
        assert torch.equal(sparse[1]._indices()[0], problem.candidates.flatten())
        # Entries are rounded to the dtype before repetitions are added.
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(sparse[1].float().to_dense(), dense[1].float(), rtol=tolerance, atol=tolerance)


def test_only_what_needs_a_gradient_gets_one() -> None:
    problem = random_problem(3, 20, 8, 2, bias=True)
    hidden, weight, candidates = problem.inputs(torch.float32)
    for log_probs in (False, True):
        out = candidate_logits(hidden.requires_grad_(), weight, candidates, log_probs=log_probs)
        out.sum().backward()
        assert weight.grad is None
        with torch.no_grad():
            assert not candidate_logits(hidden, weight, candidates, log_probs=log_probs).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_candidates_and_threads_do_not_show(isa: str, dtype: torch.dtype) -> None:
    """Bit by bit, with enough work for threads."""
    problem = random_problem(39, 1100, 100, 200, bias=True, softcap=5.0)
    hidden, weight, candidates = problem.inputs(dtype)
    threads = torch.get_num_threads()
    for log_probs in (False, True):
        keywords = problem.keywords(dtype) | {"log_probs": log_probs}
        try:
            results = []
            for number in (1, 2, 5):
                torch.set_num_threads(number)
                results.append(candidate_logits(hidden, weight, candidates, **keywords))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        per_row = candidates.repeat(len(hidden), 1)
        assert torch.equal(candidate_logits(hidden, weight, per_row, **keywords), results[0])
        for i in range(len(hidden)):
            alone = candidate_logits(hidden[i, None], weight, candidates[i : i + 3], **keywords)
            assert torch.equal(alone[0], results[0][i, i : i + 3])
        pair = candidate_logits(hidden[5:7], weight, candidates, **keywords)
        assert torch.equal(pair, results[0][5:7])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025])
def test_every_entry_counts_once(isa: str, dtype: torch.dtype, vocabulary: int) -> None:
    """The probabilities of the vocabulary sum to 1, at the edges of tiles, blocks and parts."""
    problem = random_problem(3, vocabulary, 33, 1, bias=True)
    hidden, weight, _ = problem.inputs(dtype)
    out = candidate_logits(hidden, weight, torch.arange(vocabulary), bias=problem.bias.to(dtype), log_probs=True)
    torch.testing.assert_close(out.double().exp().sum(dim=1), torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=0)


def test_nan_stays_with_its_row(isa: str) -> None:
    problem = random_problem(35, 700, 50, 3)
    for dtype in DTYPES:
        hidden, weight, candidates = problem.inputs(dtype)
        for log_probs in (False, True):
            before = candidate_logits(hidden, weight, candidates, log_probs=log_probs)
            broken = hidden.clone()
            broken[[2, 33], [7, 49]] = float("nan")
            after = candidate_logits(broken, weight, candidates, log_probs=log_probs)
            assert after[[2, 33]].isnan().all()
            assert torch.equal(after[:2], before[:2])
            assert torch.equal(after[3:33], before[3:33])
            assert torch.equal(after[34:], before[34:])
        # A weight that no candidate names is part of the log-sum-exp alone.
        for entry in (600, 699):
            poisoned = weight.clone()
            poisoned[entry, 3] = float("nan")
            few = torch.tensor([0, 65])
            assert torch.equal(candidate_logits(hidden, poisoned, few), candidate_logits(hidden, weight, few))
            assert candidate_logits(hidden, poisoned, few, log_probs=True).isnan().all()


def test_entries_of_no_probability(isa: str) -> None:
    """A bias of -inf masks entries, a whole part too; with nothing left the result is NaN, as log_softmax has it."""
    problem = random_problem(5, 1100, 40, 1)
    bias = torch.full((1100,), float("-inf"))
    bias[600:605] = 0.5
    candidates = torch.tensor([0, 600, 604, 1099])
    hidden, weight, _ = problem.inputs(torch.float32)
    out = candidate_logits(hidden, weight, candidates, bias=bias, log_probs=True)
    expected = reference.candidate_logits(hidden, weight, candidates, bias=bias, log_probs=True)
    torch.testing.assert_close(out, expected)
    assert (out[:, [0, 3]] == float("-inf")).all()
    nothing = torch.full_like(bias, float("-inf"))
    assert candidate_logits(hidden, weight, candidates, bias=nothing, log_probs=True).isnan().all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_large_logits(isa: str, sign: float) -> None:
    """Up to 1e4: log-probabilities are differences, and their errors those of differences."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.full((2, 1), 100.0 * sign)
    offsets = torch.rand(900, 1, generator=generator)
    weight = (100.0 - torch.linspace(0, 0.2, 900)[:, None] - offsets / 64).bfloat16().float()
    candidates = torch.tensor([0, 1, 450, 899])
    for dtype in (torch.float32, torch.bfloat16):
        inputs = hidden.to(dtype), weight.to(dtype)
        truth = reference.candidate_logits(*(x.double() for x in inputs), candidates, log_probs=True)
        out = candidate_logits(*inputs, candidates, log_probs=True)
        torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=2e-6)


def test_documents_that_tie_in_bfloat16_keep_their_order(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 512, generator=generator).bfloat16()
    weight = torch.randn(1, 512, generator=generator).repeat(2, 1).bfloat16()
    weight[1, 17] *= 1.0 + 2.0**-7
    tied = F.linear(hidden, weight)[0]
    assert tied[0] == tied[1]
    scores = candidate_logits(hidden, weight, torch.tensor([0, 1]))[0].double()
    truth = (hidden.double() @ weight.double().T)[0]
    assert scores[0] != scores[1]
    torch.testing.assert_close(scores[1] - scores[0], truth[1] - truth[0], rtol=0.05, atol=0)


def test_nothing(isa: str) -> None:
    """No rows, no candidates, no columns, no vocabulary."""
    for dtype in DTYPES:
        hidden, weight = torch.randn(3, 8).to(dtype), torch.randn(20, 8).to(dtype)
        few, none = torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64)
        for log_probs in (False, True):
            assert candidate_logits(hidden[:0], weight, few, log_probs=log_probs).shape == (0, 2)
            assert candidate_logits(hidden[:0], weight, few.expand(0, 2), log_probs=log_probs).shape == (0, 2)
            assert candidate_logits(hidden, weight, none, log_probs=log_probs).shape == (3, 0)
            assert candidate_logits(hidden, weight[:0], none, log_probs=log_probs).shape == (3, 0)
            bias = torch.arange(20).to(dtype)
            out = candidate_logits(hidden[:, :0], weight[:, :0], few, bias=bias, log_probs=log_probs)
            expected = bias.float().log_softmax(0) if log_probs else bias.float()
            torch.testing.assert_close(out, expected[few].expand(3, 2))
        hidden.requires_grad_(), weight.requires_grad_()
        candidate_logits(hidden, weight, none).sum().backward()
        assert not hidden.grad.any()
        assert not weight.grad.any()


BAD = {
    "hidden: expected a floating-point": (TypeError, {"hidden": torch.zeros(4, 8, dtype=torch.int64)}),
    "hidden: expected 2 dimensions": (ValueError, {"hidden": torch.zeros(8)}),
    "weight: expected 2 dimensions": (ValueError, {"weight": torch.zeros(2, 20, 8)}),
    "weight: expected the dtype of hidden": (TypeError, {"weight": torch.zeros(20, 8, dtype=torch.bfloat16)}),
    "weight: expected the hidden size, 8": (ValueError, {"weight": torch.zeros(20, 7)}),
    "candidates: expected integers": (TypeError, {"candidates": torch.zeros(3)}),
    r"candidates: expected shape \[C\] or \[4, C\]": (ValueError, {"candidates": torch.zeros(3, 2, dtype=torch.int64)}),
    r"candidates: expected token ids in \[0, 20\), got \[3, 20\]": (ValueError, {"candidates": torch.tensor([3, 20])}),
    r"candidates: expected token ids in \[0, 20\), got \[-1\]": (ValueError, {"candidates": torch.tensor([-1])}),
    r"candidates: expected token ids in \[0, 20\), got \[\[0\], \[1\], \[2\], \[9223372036854775807\]\]": (
        ValueError, {"candidates": torch.tensor([[0], [1], [2], [2**63 - 1]])},
    ),
    "bias: expected the dtype of weight": (TypeError, {"bias": torch.zeros(20, dtype=torch.float64)}),
    r"bias: expected shape \[20\]": (ValueError, {"bias": torch.zeros(21)}),
    "scale: expected a finite number": (ValueError, {"scale": float("inf")}),
    "softcap: expected a positive finite number or None": (ValueError, {"softcap": 0.0}),
    "sparse_grad: expected False with log_probs": (ValueError, {"sparse_grad": True, "log_probs": True}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input(message: str, backend: str) -> None:
    error, changes = BAD[message]
    arguments = {"hidden": torch.ones(4, 8), "weight": torch.ones(20, 8), "candidates": torch.tensor([1, 2])} | changes
    with backends.use(backend=backend), pytest.raises(error, match=message):
        candidate_logits(**arguments)


def test_float64_runs_the_reference() -> None:
    hidden, weight, candidates = random_problem(2, 20, 8, 3).inputs(torch.float64)
    with pytest.warns(UserWarning, match="no kernel for torch.float64"):
        assert candidate_logits(hidden, weight, candidates).dtype == torch.float64
    with backends.use(backend="cpu"), pytest.raises(NotImplementedError, match="no kernel for"):
        candidate_logits(hidden, weight, candidates)


# What PyTorch asks of an op.


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    op = torch.ops.rankernel.candidate_logits.default
    for per_row, log_probs, sparse in ((False, False, False), (True, False, True), (True, True, False)):
        problem = random_problem(3, 40, 16, 4, per_row=per_row, bias=True)
        hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (problem.hidden, problem.weight, problem.bias))
        arguments = (hidden, weight, problem.candidates, bias, 0.5, 3.0, log_probs, sparse)
        # AOT dispatch cannot trace sparse gradients, of any op.
        tests = ("test_schema", "test_autograd_registration", "test_faketensor") if sparse else None
        torch.library.opcheck(op, arguments, **({"test_utils": tests} if tests else {}))


@pytest.mark.parametrize("log_probs", [False, True])
def test_compiled_in_one_graph_for_any_batch(log_probs: bool) -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    problem = random_problem(9, 60, 16, 3, bias=True)

    def step(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return candidate_logits(hidden.sin(), weight, problem.candidates, log_probs=log_probs, softcap=4.0).square()

    compiled = torch.compile(step, backend=graphs, fullgraph=True)
    for num_rows in (3, 5, 9):
        grads = []
        for function in (step, compiled):
            hidden = problem.hidden[:num_rows].float().requires_grad_()
            weight = problem.weight.float().requires_grad_()
            out = function(hidden, weight)
            out.sum().backward()
            grads.append((out, hidden.grad, weight.grad))
        for eager, ours in zip(*grads, strict=True):
            assert torch.equal(ours, eager)
    assert graphs.frame_count == 2  # the first number of rows, then any


def test_inductor() -> None:
    torch._dynamo.reset()
    problem = random_problem(4, 60, 16, 3, per_row=True)
    hidden, weight, candidates = problem.inputs(torch.bfloat16)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    results = []
    for function in (candidate_logits, torch.compile(candidate_logits, fullgraph=True)):
        out = function(hidden, weight, candidates, log_probs=True)
        results.append((out, *torch.autograd.grad(out.sum(), (hidden, weight))))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(compiled, eager)


def test_autocast() -> None:
    problem = random_problem(3, 30, 16, 2)
    hidden, weight, candidates = problem.inputs(torch.float32)
    head = weight.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = candidate_logits(hidden, head, candidates)
        wide = candidate_logits(hidden.bfloat16(), weight, candidates)
    assert torch.equal(out, candidate_logits(hidden.bfloat16(), head, candidates))
    assert torch.equal(wide, candidate_logits(hidden.bfloat16().float(), weight, candidates))


def test_memory_does_not_hold_the_logits_of_the_vocabulary() -> None:
    """Those of 256 rows and 200,000 entries would be 195 MiB; the gradient of the weights is 12 MiB."""
    script = """
import resource, torch, rankernel
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
hidden, weight = torch.randn(256, 16, requires_grad=True), torch.randn(200_000, 16, requires_grad=True)
few = torch.tensor([5, 199_999])
rankernel.candidate_logits(hidden[:2], weight[:10_000], few[:1], log_probs=True).sum().backward()
before = peak()
out = rankernel.candidate_logits(hidden, weight, few, log_probs=True)
print(peak() - before)
out.sum().backward()
print(peak() - before)
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    forward, both = map(float, output.split())
    assert forward < 20
    assert both < 100
