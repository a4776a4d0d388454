"""The Triton kernels of document_scores against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rankernel.triton_kernels import document_scores as kernels

import rankernel
from attention_cases import DTYPES, Problem, assert_close, problems
from rankernel import BlockLayout, backends, reference
from rankernel.layout import Pattern
from rankernel.ops import _checks
from rankernel.reference.block_attention import attention_logits

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory", "interpreted_dot"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of infinities and NaN that are meant
]
OPS = ("document_logsumexp", "token_attention_mass")
every_op = pytest.mark.parametrize("name", OPS)


def padded(tensor: torch.Tensor) -> torch.Tensor:
    """Between NaN that belong to no head."""
    return F.pad(tensor, (2, 3, 1, 0), value=torch.nan)[:, 1:, 2:-3]


def arguments(layout: BlockLayout, rows: torch.Tensor, scale: float, softcap: float | None) -> tuple[object, ...]:
    return rows.long(), layout.cu_seqlens, layout.list_offsets, layout.causal, layout.max_documents, scale, softcap


def run(
    name: str, query: torch.Tensor, key: torch.Tensor, layout: BlockLayout, rows: torch.Tensor, upstream: torch.Tensor,
    scale: float | None = None, softcap: float | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """Result, and gradients of query and key."""
    inputs = padded(query), padded(key), *arguments(layout, rows, scale or query.shape[2] ** -0.5, softcap)
    out = getattr(kernels, name)(*inputs)
    assert out.dtype == torch.float32
    return [out, *getattr(kernels, f"{name}_backward")(upstream.float(), out, *inputs)]


def upstream_of(result: torch.Tensor) -> torch.Tensor:
    """Gradient of the result, NaN where nothing flows back."""
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return upstream.masked_fill(result.isneginf(), torch.nan)


def check(name: str, problem: Problem, rows: torch.Tensor, dtype: torch.dtype) -> None:
    query, key = problem.query.to(dtype)[rows.long()], problem.key.to(dtype)
    upstream = upstream_of(getattr(reference, name)(query, key, problem.layout, rows, **problem.options))

    def in_pytorch(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = query.to(dtype), key.to(dtype), problem.layout, rows
        leaves = [leaf.detach().requires_grad_() for leaf in inputs[:2]]
        with backends.use(backend="reference"):
            out = getattr(rankernel, name)(*leaves, *inputs[2:], **problem.options)
            return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    eager, truth = in_pytorch(dtype), in_pytorch(torch.float64)
    ours = run(name, query, key, problem.layout, rows, upstream, **problem.options)
    assert ours[1].dtype == ours[2].dtype == dtype
    # In the tiles of another kernel a logit rounds otherwise, and exp(S - lse) has its error as a relative one.
    logits = attention_logits(query.double(), key.double(), scale=problem.options.get("scale"), softcap=None)
    largest = logits.abs().max().item() if logits.numel() else 0.0
    for what, a, b, c in zip(("forward", "dq", "dk"), ours, eager, truth, strict=True):
        again = what != "forward" or name == "token_attention_mass"
        magnitude = largest * c.abs().max().item() if again and c.numel() else 0.0
        assert_close(a, b, c, f"{name} {dtype} {what}", magnitude)


@st.composite
def problems_with_rows(draw: st.DrawFn) -> tuple[Problem, torch.Tensor]:
    problem = draw(problems(attention=False))
    tokens = problem.layout.num_tokens
    rows = draw(st.lists(st.integers(0, tokens - 1), max_size=6)) if tokens else []
    return problem, torch.tensor(rows, dtype=torch.int64)


def make_problem(
    lengths: list[tuple[int, list[int], int]], heads: tuple[int, int, int], pattern: Pattern = "block", **options: Any
) -> Problem:
    """``heads``: query heads, KV heads, head size."""
    layout = BlockLayout.from_lengths(lengths, pattern)
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(layout.num_tokens, count, heads[2], generator=generator, dtype=torch.float64) for count in heads[:2]
    )
    return Problem(layout, query, key, key, options)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are slow here: few parts, and large tiles of float32, too."""
    monkeypatch.setattr(kernels, "PROGRAMS", 8)
    sizes = kernels._sizes
    monkeypatch.setattr(kernels, "_sizes", lambda *arguments: sizes(*arguments[:3], torch.float16))


@pytest.mark.usefixtures("few_programs")
@every_op
@settings(max_examples=8)
@given(case=problems_with_rows(), dtype=st.sampled_from(DTYPES))
def test_random_problems(name: str, case: tuple[Problem, torch.Tensor], dtype: torch.dtype) -> None:
    check(name, *case, dtype)


@every_op
@pytest.mark.parametrize("pattern", ["block", "causal"])
def test_many_rows_and_heads(monkeypatch: pytest.MonkeyPatch, name: str, pattern: Pattern) -> None:
    """Several tiles of rows, blocks of heads, parts of one segment, and of several."""
    problem = make_problem([(3, [9, 1, 40], 6), (0, [], 1), (0, [2] * 5, 2)], (9, 1, 20), pattern, softcap=3.0)
    rows = torch.randint(problem.layout.num_tokens, (12,), generator=torch.Generator().manual_seed(1))
    for programs, dtype in ((40, torch.float32), (1, torch.bfloat16)):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        check(name, problem, rows, dtype)


@every_op
def test_order_of_rows_does_not_matter(name: str) -> None:
    problem = make_problem([(3, [9, 17], 6), (2, [4], 3)], (4, 2, 16))
    rows = torch.arange(problem.layout.num_tokens)
    query, key = problem.query.float(), problem.key.float()
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))
    by_row = name == "document_logsumexp"
    upstream = upstream_of(getattr(reference, name)(query, key, problem.layout, rows))
    first = run(name, query, key, problem.layout, rows, upstream)
    second = run(
        name, query[shuffled], key, problem.layout, rows[shuffled], upstream[shuffled] if by_row else upstream
    )  # fmt: skip
    for a, b, of_row in zip(first, second, (by_row, True, False), strict=True):
        assert torch.equal(a[shuffled] if of_row else a, b)


@every_op
def test_rows_in_no_list(name: str) -> None:
    problem = make_problem([(3, [9, 0, 17], 6), (2, [4], 3)], (2, 1, 16))
    tokens = problem.layout.num_tokens
    good = torch.tensor([35, 40, 6])
    rows = torch.tensor([-1, 35, 2**40, 40, 6, tokens, -(2**62)])
    inside = (rows >= 0) & (rows < tokens)
    query = torch.full((len(rows), 2, 16), torch.nan)
    query[inside], key = problem.query.float()[good], problem.key.float()
    expected = getattr(reference, name)(query[inside], key, problem.layout, good)
    upstream, every = upstream_of(expected), torch.full((len(rows), *expected.shape[1:]), torch.nan)
    clean = run(name, query[inside], key, problem.layout, good, upstream)
    by_row = name == "document_logsumexp"
    if by_row:
        every[inside] = upstream.float()
    out, grad_query, grad_key = run(name, query, key, problem.layout, rows, every if by_row else upstream)
    if by_row:
        assert out[~inside].isnan().all()
        out = out[inside]
    assert not grad_query[~inside].any()
    for a, b in zip((out, grad_query[inside], grad_key), clean, strict=True):
        assert torch.equal(a, b)


def test_nan_stays_in_its_document_and_row() -> None:
    problem = make_problem([(4, [6, 5, 7], 3)], (4, 2, 16))
    rows = torch.tensor([23, 24])
    query, key = problem.query.float()[rows], problem.key.float()
    upstream = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    upstream[0, :, 1] = 0
    upstream[0, 2] = 0
    before = run("document_logsumexp", query, key, problem.layout, rows, upstream)
    assert not before[1][0, 2].any()
    key[10:15] = query[0, 2] = torch.nan
    after = run("document_logsumexp", query, key, problem.layout, rows, upstream)
    assert after[0][..., 1].isnan().all()
    after[0][..., 1] = before[0][..., 1]
    after[0][0, 2] = before[0][0, 2]
    assert torch.equal(before[0], after[0])
    # The second row's gradient for the second document is not 0.
    assert after[1][1].isnan().all()
    assert after[2][10:15].isnan().all()
    after[1][1], after[2][10:15] = before[1][1], before[2][10:15]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


def test_infinite_gradients_of_nothing() -> None:
    problem = make_problem([(4, [6, 5, 0, 7], 3), (1, [2], 2)], (4, 2, 16))
    rows = torch.tensor([24, 29])
    upstream = torch.zeros(2, 4, 4)
    upstream[0, :, 2] = upstream[1, :, 1:] = torch.inf  # of documents without tokens and of none
    upstream[0, 0, 1] = torch.nan
    inputs = problem.query.float()[rows], problem.key.float(), problem.layout, rows
    _, grad_query, grad_key = run("document_logsumexp", *inputs, upstream)
    assert grad_query[0, 0].isnan().all()
    assert grad_key[10:15, 0].isnan().all()
    grad_query[0, 0] = grad_key[10:15, 0] = 0
    assert not grad_query.any()
    assert not grad_key.any()


@every_op
def test_empty(name: str) -> None:
    for lengths in ([], [(0, [], 0)], [(2, [0, 3], 1), (0, [], 2)], [(3, [], 1)]):
        problem = make_problem(lengths, (4, 2, 16))
        for rows in (torch.zeros(0, dtype=torch.int64), torch.arange(problem.layout.num_tokens)):
            check(name, problem, rows, torch.float32)


@every_op
def test_layouts_that_are_none(name: str) -> None:
    """Any memory beyond the tensors that is read or written is so far away that it crashes."""
    problem = make_problem([(4, [6, 5], 3), (1, [2], 2)], (2, 1, 16))
    rows = torch.tensor([22, 5, 17, 2**40])
    inputs = torch.ones(4, 2, 16), problem.key.float()
    upstream = torch.ones(4, 2, 2) if name == "document_logsumexp" else torch.ones(problem.layout.num_tokens)
    far = 10**9
    for boundaries in ([0, far, 3, -far, 18, 19, far, far], [far] * 8, [-far] * 8):
        problem.layout.cu_seqlens.copy_(torch.tensor(boundaries))
        run(name, *inputs, problem.layout, rows, upstream)
    for offsets in ([0, -far, far], [far, 3, 7], [0, 0, 0], [7, 4, 0]):
        problem.layout.list_offsets.copy_(torch.tensor(offsets))
        run(name, *inputs, problem.layout, rows, upstream)


@every_op
def test_public_function(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(backends, "implementation_for", lambda tensor: "triton")
    monkeypatch.setattr(_checks, "why_no_kernel_of", lambda implementation, tensor: None)
    problem = make_problem([(4, [6, 5], 3), (1, [2], 2)], (4, 2, 16))
    rows = torch.tensor([22, 17], dtype=torch.int32)
    query, key = problem.query.float()[rows], problem.key.float()
    expected = getattr(reference, name)(query, key, problem.layout, rows)
    leaves = query.requires_grad_(), key.mT.contiguous().mT.requires_grad_()
    with backends.use(backend="triton"):
        out = getattr(rankernel, name)(*leaves, problem.layout, rows)
        grads = torch.autograd.grad(out, leaves, upstream_of(expected).float())
    with torch.no_grad():
        ours = run(name, query, key, problem.layout, rows, upstream_of(expected))
    assert all(map(torch.equal, (out, *grads), ours))
