"""document_logsumexp and token_attention_mass: against float64 on random layouts, every instruction set and dtype."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import DTYPES, Problem, assert_close, problems
from rankernel import BlockLayout, backends, document_logsumexp, reference, token_attention_mass

OPS = {
    "document_logsumexp": (document_logsumexp, reference.document_logsumexp),
    "token_attention_mass": (token_attention_mass, reference.token_attention_mass),
}
LENGTHS = [(5, [9, 1, 0, 40], 6), (0, [3, 17], 2), (7, [], 1)]


@st.composite
def problems_with_rows(draw: st.DrawFn) -> tuple[Problem, torch.Tensor]:
    problem = draw(problems(attention=False))
    tokens = problem.layout.num_tokens
    rows = draw(st.lists(st.integers(0, tokens - 1), max_size=6)) if tokens else []
    return problem, torch.tensor(rows, dtype=draw(st.sampled_from([torch.int64, torch.int32])))


def tensors(layout: BlockLayout, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows.numel(), 4, 16, generator=generator)
    return query, torch.randn(layout.num_tokens, 2, 16, generator=generator)


def every_tail_row(layout: BlockLayout) -> torch.Tensor:
    return torch.cat([torch.arange(rows[-1][0], rows[-1][1]) for rows in layout.segments()])


@pytest.mark.parametrize("name", OPS)
@given(problems_with_rows())
def test_reference_is_a_reduction_of_dense_attention(name: str, case: tuple[Problem, torch.Tensor]) -> None:
    problem, rows = case
    layout, query = problem.layout, problem.query[rows.long()]
    ours = OPS[name][1](query, problem.key, layout, rows, **problem.options)
    keys = problem.key.repeat_interleave(query.shape[1] // problem.key.shape[1], 1)
    logits = torch.einsum("rhd,jhd->rhj", query, keys) * (problem.options["scale"] or query.shape[-1] ** -0.5)
    if problem.options["softcap"]:
        logits = problem.options["softcap"] * torch.tanh(logits / problem.options["softcap"])
    logits = logits.masked_fill(~layout.dense_mask()[rows.long()][:, None], float("-inf"))
    list_of_token = torch.cat([torch.full((s[-1][1] - s[0][0],), i) for i, s in enumerate(layout.segments())])
    owners = list_of_token[rows.long()]
    if name == "document_logsumexp":
        truth = torch.full((rows.numel(), query.shape[1], layout.max_documents), float("-inf"), dtype=torch.float64)
        for r, owner in enumerate(owners.tolist()):
            for d, (begin, end, _) in enumerate(layout.segments()[owner][1:-1]):
                truth[r, :, d] = torch.logsumexp(logits[r, :, begin:end], -1)
    else:
        counts = torch.bincount(owners, minlength=layout.num_lists).clamp(min=1)
        weights = torch.softmax(logits, -1) / counts[owners][:, None, None]
        truth = weights.sum((0, 1)) if rows.numel() else torch.zeros(layout.num_tokens, dtype=torch.float64)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", OPS)
@given(problems_with_rows())
def test_every_isa_and_dtype(name: str, case: tuple[Problem, torch.Tensor]) -> None:
    problem, rows = case
    op, specification = OPS[name]
    for dtype in DTYPES:
        # Strided rows, as a slice of all queries has them.
        query, key = problem.query.to(dtype)[rows.long()], problem.key.to(dtype)
        truth = specification(query.double(), key.double(), problem.layout, rows, **problem.options)
        eager = specification(query, key, problem.layout, rows, **problem.options)
        for isa in backends.available_isas():
            with backends.use(backend="cpu", isa=isa):
                ours = op(query, key, problem.layout, rows, **problem.options)
                again = op(query, key, problem.layout, rows, **problem.options)
            assert ours.dtype == torch.float32
            assert_close(ours, eager, truth, f"{isa} {dtype}")
            assert torch.equal(ours, again)


@pytest.mark.parametrize("name", OPS)
def test_long_documents(isa: str, name: str) -> None:
    layout = BlockLayout.from_lengths([(700, [1300, 3], 530), (2, [5], 3)])
    rows = torch.tensor([2532, 10, 2010, 2004, 1999, 2540])
    query, key = tensors(layout, rows)
    op, specification = OPS[name]
    truth = specification(query.double(), key.double(), layout, rows)
    assert_close(op(query, key, layout, rows), specification(query, key, layout, rows), truth)


def test_mass_sums_to_the_number_of_heads(isa: str) -> None:
    layout = BlockLayout.from_lengths(LENGTHS)
    rows = every_tail_row(layout)[:-1]  # none of the last list
    mass = token_attention_mass(*tensors(layout, rows), layout, rows)
    per_list = [mass[rows[0][0] : rows[-1][1]].sum().item() for rows in layout.segments()]
    assert per_list == pytest.approx([4.0, 4.0, 0.0], abs=1e-5)


def test_nan_in_another_document_stays_there(isa: str) -> None:
    layout = BlockLayout.from_lengths([(4, [6, 5, 7], 3)])
    rows = torch.tensor([23, 24])
    query, key = tensors(layout, rows)
    before = document_logsumexp(query, key, layout, rows)
    key[10:15] = float("nan")
    after = document_logsumexp(query, key, layout, rows)
    assert torch.equal(before[..., [0, 2]], after[..., [0, 2]])
    assert after[..., 1].isnan().all()


@pytest.mark.parametrize("name", OPS)
def test_empty(isa: str, name: str) -> None:
    for lengths in ([], [(0, [], 0)], LENGTHS):
        layout = BlockLayout.from_lengths(lengths)
        rows = torch.zeros(0, dtype=torch.int64)
        query, key = tensors(layout, rows)
        out = OPS[name][0](query, key, layout, rows)
        expected = (0, 4, layout.max_documents) if name == "document_logsumexp" else (layout.num_tokens,)
        assert out.shape == expected
        assert not out.any()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", OPS)
@given(problems_with_rows())
def test_gradients(name: str, case: tuple[Problem, torch.Tensor]) -> None:
    problem, rows = case
    op, specification = OPS[name]

    def gradients(function, query, key) -> list[torch.Tensor]:
        leaves = [query.detach().requires_grad_(), key.detach().requires_grad_()]
        out = function(*leaves, problem.layout, rows, **problem.options)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        seen = torch.isfinite(out)
        if not out.requires_grad or not seen.any():
            return [torch.zeros_like(leaf) for leaf in leaves]
        total = (out[seen] * upstream.to(out.dtype)[seen]).sum()
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]

    query, key = problem.query[rows.long()], problem.key
    with backends.use(backend="reference"):
        exact = gradients(op, query, key)
    for ours, truth in zip(exact, gradients(specification, query, key), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    for dtype in DTYPES:
        inputs = query.to(dtype), key.to(dtype)
        truth = gradients(specification, *(t.double() for t in inputs))
        eager = gradients(specification, *inputs)
        # A weight exp(logit - lse) is off by an ulp of the logit; it multiplies upstream gradients, about 4, and Q or K
        scale = problem.options["scale"] or key.shape[-1] ** -0.5
        norms = [t.norm(dim=-1).max().item() if t.numel() else 0.0 for t in inputs]
        magnitude = 4 * scale * max(norms) * (1 + scale * norms[0] * norms[1])
        for name_of, a, b, c in zip("qk", gradients(op, *inputs), eager, truth, strict=True):
            assert_close(a, b, c, f"{dtype} {name_of}", magnitude)


@pytest.mark.parametrize("name", OPS)
def test_gradcheck_and_opcheck(name: str) -> None:
    layout = BlockLayout.from_lengths([(2, [3, 1], 2), (1, [2, 2], 1)])
    rows = torch.tensor([7, 6, 13])
    query, key = tensors(layout, rows)
    with backends.use(backend="reference"):
        leaves = [t.double().requires_grad_() for t in (query, key)]
        assert torch.autograd.gradcheck(lambda q, k: OPS[name][0](q, k, layout, rows, softcap=2.0), leaves)
    arguments = (
        query.requires_grad_(), key.requires_grad_(), rows, layout.cu_seqlens, layout.list_offsets, False,
        layout.max_documents, 0.25, None,
    )  # fmt: skip
    torch.library.opcheck(getattr(torch.ops.rankernel, name).default, arguments)


@pytest.mark.parametrize("name", OPS)
def test_compile_is_one_graph_without_recompiling(name: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(OPS[name][0], backend=counter, fullgraph=True)
    for documents in ([9, 1, 0, 40], [10, 10, 10, 20], [1, 9, 25, 15]):
        layout = BlockLayout.from_lengths([(5, documents, 6)])
        rows = torch.tensor([58, 59])
        query, key = tensors(layout, rows)
        torch.testing.assert_close(
            compiled(query, key, layout, rows), OPS[name][0](query, key, layout, rows), equal_nan=True
        )
    assert counter.frame_count == 1


BAD = {
    "rows: expected integers": (TypeError, {"rows": torch.tensor([1.0, 2.0])}),
    "rows: expected shape": (ValueError, {"rows": torch.tensor([1])}),
    "rows: expected positions": (ValueError, {"rows": torch.tensor([1, 83])}),
    "rows: expected positions of packed tokens, got tensor": (ValueError, {"rows": torch.tensor([-1, 3])}),
    "query: expected 3 dimensions": (ValueError, {"query": torch.zeros(2, 4)}),
    "key: expected the head size": (ValueError, {"key": torch.zeros(83, 2, 8)}),
    "key: expected 83 tokens": (ValueError, {"key": torch.zeros(82, 2, 16)}),
    "key: expected the dtype": (TypeError, {"key": torch.zeros(83, 2, 16, dtype=torch.bfloat16)}),
    "layout: expected a BlockLayout": (TypeError, {"layout": None}),
    "scale: expected": (ValueError, {"scale": float("nan")}),
    "softcap: expected": (ValueError, {"softcap": -1.0}),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input(name: str, message: str, backend: str) -> None:
    error, changes = BAD[message]
    layout = BlockLayout.from_lengths([(5, [9, 1, 0, 40], 6), (0, [3, 11, 4], 4)])
    rows = torch.tensor([60, 82])
    query, key = tensors(layout, rows)
    arguments = {"query": query, "key": key, "layout": layout, "rows": rows} | changes
    with backends.use(backend=backend), pytest.raises(error, match=message):
        OPS[name][0](**arguments)


@pytest.mark.parametrize("name", OPS)
def test_damaged_layout_raises(isa: str, name: str) -> None:
    layout = BlockLayout.from_lengths(LENGTHS)
    rows = torch.tensor([60])
    query, key = tensors(layout, rows)
    layout.cu_seqlens[1] = 10_000
    with pytest.raises(ValueError, match="layout: its cu_seqlens"):
        OPS[name][0](query, key, layout, rows)
