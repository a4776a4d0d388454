"""The Triton kernels of candidate_logits against the reference in float64.

The interpreter takes the bits of bfloat16 for integers in ``tl.dot``: in the kernels that have one it gets float32 and
float16 here, and bfloat16 only on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rankernel.triton_kernels import candidate_logits as kernels

from attention_cases import DTYPES, assert_close
from rankernel import reference

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of infinities and NaN that are meant
]

DOT_DTYPES = (torch.float32, torch.float16)


@dataclass
class Problem:
    """Float64 tensors; rows of hidden and weight end in ``padding`` NaN that belong to no row."""

    hidden: torch.Tensor
    weight: torch.Tensor
    candidates: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None
    padding: int

    def in_dtype(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        hidden, weight = (
            torch.nn.functional.pad(tensor, (0, self.padding), value=torch.nan).to(dtype)[:, : tensor.shape[1]]
            for tensor in (self.hidden, self.weight)
        )
        return hidden, weight, None if self.bias is None else self.bias.to(dtype)

    def expected(self, dtype: torch.dtype, wide: torch.dtype, log_probs: bool) -> torch.Tensor:
        hidden, weight, bias = (None if tensor is None else tensor.to(wide) for tensor in self.in_dtype(dtype))
        return reference.candidate_logits(
            hidden, weight, self.candidates, bias=bias, scale=self.scale, softcap=self.softcap, log_probs=log_probs
        )


def problem(
    num_rows: int, vocabulary: int, hidden_size: int, num_candidates: int, seed: int = 0, shared: bool = True,
    bias: bool = False, scale: float = 1.0, softcap: float | None = None, padding: int = 0, spread: float = 1.0,
) -> Problem:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = (num_candidates,) if shared else (num_rows, num_candidates)
    return Problem(
        normal(num_rows, hidden_size),
        normal(vocabulary, hidden_size) * spread / max(hidden_size, 1) ** 0.5,
        torch.randint(vocabulary, shape, generator=generator),
        normal(vocabulary) if bias else None,
        scale,
        softcap,
        padding,
    )


def run(p: Problem, dtype: torch.dtype = torch.float32, log_probs: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight, bias = p.in_dtype(dtype)
    out, lse = kernels.candidate_logits(hidden, weight, p.candidates, bias, p.scale, p.softcap, log_probs)
    assert out.dtype == lse.dtype == torch.float32
    return out, lse


def check(p: Problem, dtype: torch.dtype, log_probs: bool) -> None:
    out, lse = run(p, dtype, log_probs)
    eager, truth = (p.expected(dtype, wide, log_probs) for wide in (torch.float32, torch.float64))
    what = f"{list(p.hidden.shape)} {list(p.weight.shape)} {dtype} {log_probs}"
    every = Problem(**vars(p) | {"candidates": torch.arange(len(p.weight))})
    logits = [every.expected(dtype, wide, False) for wide in (torch.float32, torch.float64)]
    # Rounding of the logits, which log-probabilities near 0 no longer show.
    magnitude = logits[1].abs().max().item() if logits[1].numel() else 0.0
    assert_close(out, eager, truth, what, magnitude)
    if log_probs:
        assert_close(lse, *(z.logsumexp(dim=-1) for z in logits), f"log-sum-exp {what}", magnitude)
    else:
        assert lse.shape == (0,)


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems take several steps."""
    monkeypatch.setattr(kernels, "BLOCK", 64)
    monkeypatch.setattr(kernels, "PARTS", 2)


@pytest.fixture
def only_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MATRIX_FROM", 0)


@st.composite
def problems(draw: st.DrawFn, shared: bool | None = None) -> Problem:
    num_rows = draw(st.one_of(st.integers(1, 4), st.integers(1, 70)))
    # Logits that are a program each take their time.
    most = 300 if shared else min(40, 1 + 200 // num_rows)
    return problem(
        num_rows,
        vocabulary=draw(st.one_of(st.integers(1, 5), st.integers(1, 600))),
        hidden_size=draw(st.one_of(st.integers(1, 200), st.sampled_from([32, 64, 128]))),
        num_candidates=draw(st.integers(1, most)),
        seed=draw(st.integers(0, 2**31)),
        shared=draw(st.booleans()) if shared is None else shared,
        bias=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 0.0625, -0.5])),
        softcap=draw(st.sampled_from([None, 0.7, 30.0])),
        padding=draw(st.sampled_from([0, 0, 3, 16])),
        spread=draw(st.sampled_from([0.1, 1.0, 20.0])),
    )


@pytest.mark.usefixtures("short_steps")
@settings(max_examples=40)
@given(p=problems(), dtype=st.sampled_from(DTYPES))
def test_random_logits(p, dtype) -> None:
    check(p, dtype, log_probs=False)


@pytest.mark.usefixtures("only_matrices")
@settings(max_examples=40)
@given(p=problems(shared=True), dtype=st.sampled_from(DOT_DTYPES))
def test_random_logits_by_matrices(p, dtype) -> None:
    check(p, dtype, log_probs=False)


@pytest.mark.usefixtures("short_steps")
@settings(max_examples=40)
@given(p=problems(), dtype=st.sampled_from(DOT_DTYPES))
def test_random_log_probs(p, dtype) -> None:
    check(p, dtype, log_probs=True)


def test_sizes_as_on_a_gpu() -> None:
    check(problem(3, 3000, 4100, 4, bias=True, softcap=30.0), torch.float32, True)
    check(problem(70, 300, 40, 240), torch.float32, True)
    assert 70 * 240 >= kernels.MATRIX_FROM > 3 * 4


OUTSIDE = (-1, 50, 51, 2**31, -(2**31), 2**40, -(2**40), 2**62, -(2**63))  # of 50; far ones crash where they are read


@pytest.mark.parametrize("log_probs", [False, True])
@pytest.mark.parametrize("way", ["shared", "per row", "matrix"])
def test_candidates_outside(monkeypatch: pytest.MonkeyPatch, way: str, log_probs: bool) -> None:
    monkeypatch.setattr(kernels, "MATRIX_FROM", 0 if way == "matrix" else 10**9)
    p = problem(3, 50, 33, 2 * len(OUTSIDE), bias=True, shared=way != "per row")
    inside, _ = run(p, log_probs=log_probs)
    assert torch.isfinite(inside).all()
    p.candidates[..., ::2] = torch.tensor(OUTSIDE)
    out, lse = run(p, log_probs=log_probs)
    assert out[:, ::2].isnan().all()
    assert torch.equal(out[:, 1::2], inside[:, 1::2])
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize("limit", [0, 10**9])
def test_nan_stays_in_its_row(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(kernels, "MATRIX_FROM", limit)
    p = problem(20, 140, 40, 3, bias=True, softcap=5.0)
    clean, clean_lse = run(p, log_probs=True)
    p.hidden[7, 3], p.hidden[19, 39] = torch.nan, torch.inf
    out, lse = run(p, log_probs=True)
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[7, 19]] = True
    assert out[7].isnan().all()
    assert lse[7].isnan()
    assert torch.equal(out[~bad], clean[~bad])
    assert torch.equal(lse[~bad], clean_lse[~bad])


@pytest.mark.parametrize("limit", [0, 10**9])
def test_a_bad_weight_reaches_only_its_logits(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(kernels, "MATRIX_FROM", limit)
    p = problem(3, 5, 40, 4)
    p.candidates = torch.tensor([0, 4, -1, 2])
    p.weight[0], p.weight[4] = torch.nan, torch.inf
    out, _ = run(p)
    assert out[:, [0, 2]].isnan().all()
    assert not torch.isfinite(out[:, 1]).any()
    assert torch.isfinite(out[:, 3]).all()


def test_entries_that_a_bias_rules_out() -> None:
    """-inf over whole tiles, first and last."""
    p = problem(5, 600, 20, 3, bias=True)
    p.bias[:130] = p.bias[256:384] = p.bias[500:] = -torch.inf
    p.candidates = torch.tensor([0, 200, 599])
    check(p, torch.float32, log_probs=True)


def test_huge_logits() -> None:
    for log_probs in (False, True):
        check(problem(3, 300, 20, 4, spread=1e6), torch.float32, log_probs)
        check(problem(3, 300, 20, 4, spread=1e6, softcap=30.0), torch.float32, log_probs)


def test_small_logits_under_a_large_softcap() -> None:
    """tanh keeps their relative accuracy."""
    p = problem(4, 30, 20, 8, scale=1e-3, softcap=50.0)
    out, _ = run(p)
    torch.testing.assert_close(out.double(), p.expected(torch.float32, torch.float64, False), rtol=2e-5, atol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_empty(shared: bool) -> None:
    for sizes in ((0, 5, 4, 3), (2, 5, 4, 0), (2, 5, 0, 3), (0, 5, 0, 0)):
        check(problem(*sizes, shared=shared, bias=True), torch.float32, log_probs=False)
        check(problem(*sizes, shared=shared, bias=True), torch.float32, log_probs=True)


@pytest.mark.parametrize("limit", [0, 10**9])
def test_no_vocabulary(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(kernels, "MATRIX_FROM", limit)
    p = problem(2, 1, 4, 3, bias=True)
    p.weight, p.bias = p.weight[:0], p.bias[:0]
    out, lse = run(p, log_probs=True)
    assert out.isnan().all()
    assert lse.tolist() == [-torch.inf] * 2


def test_bits_do_not_depend_on_the_other_rows() -> None:
    p = problem(70, 300, 100, 2, bias=True, softcap=3.0)
    first = run(p, log_probs=True)
    assert all(map(torch.equal, first, run(p, log_probs=True)))
    p.hidden[:67] *= 100
    for one, other in zip(first, run(p, log_probs=True), strict=True):
        assert torch.equal(one[67:], other[67:])
