"""document_logsumexp and token_attention_mass: against float64 on random layouts, every instruction set and dtype."""

from __future__ import annotations

from typing import Any

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


def dense(
    name: str, query: torch.Tensor, key: torch.Tensor, layout: BlockLayout, rows: torch.Tensor, **options: Any
) -> torch.Tensor:
    """The ops as PyTorch users write them: logits of all keys in the dtype of the inputs, then a masked reduction."""
    rows = rows.long()
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = torch.einsum("rhd,jhd->rhj", query, keys) * (options.get("scale") or query.shape[-1] ** -0.5)
    logits = logits.to(torch.promote_types(query.dtype, torch.float32))
    if options.get("softcap"):
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    logits = logits.masked_fill(~layout.dense_mask()[rows][:, None], float("-inf"))
    list_of_token = torch.cat([torch.full((s[-1][1] - s[0][0],), i) for i, s in enumerate(layout.segments())])
    owners = list_of_token[rows]
    if name == "document_logsumexp":
        scores = []
        for owner, row_logits in zip(owners.tolist(), logits, strict=True):
            documents = layout.segments()[owner][1:-1]
            columns = [torch.logsumexp(row_logits[:, begin:end], -1) for begin, end, _ in documents]
            missing = [logits.new_full((query.shape[1],), float("-inf"))] * (layout.max_documents - len(documents))
            scores.append(torch.stack(columns + missing, -1) if columns + missing else logits.new_zeros(0))
        empty = logits.new_zeros(rows.numel(), query.shape[1], layout.max_documents)
        return torch.stack(scores) if empty.numel() else empty
    counts = torch.bincount(owners, minlength=layout.num_lists).clamp(min=1)
    weights = torch.softmax(logits, -1) / counts[owners][:, None, None]
    return weights.sum((0, 1))


def gradients(
    function: Any, query: torch.Tensor, key: torch.Tensor, layout: BlockLayout, rows: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, ...]:
    """Of query and key for a random gradient of the result, which is NaN where the result is -inf."""
    leaves = query.detach().requires_grad_(), key.detach().requires_grad_()
    out = function(*leaves, layout, rows, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return torch.autograd.grad(out, leaves, upstream.to(out.dtype).masked_fill(out.isneginf(), float("nan")))


def dense_gradients(
    name: str, query: torch.Tensor, key: torch.Tensor, layout: BlockLayout, rows: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, ...]:
    """The same through :func:`dense`, from the finite results alone."""

    def finite(*arguments: Any, **options: Any) -> torch.Tensor:
        out = dense(name, *arguments, **options)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        seen = ~out.isneginf()
        return (out[seen] * upstream.to(out.dtype)[seen]).sum()

    leaves = query.detach().requires_grad_(), key.detach().requires_grad_()
    total = finite(*leaves, layout, rows, **options)
    if not total.requires_grad:
        return torch.zeros_like(query), torch.zeros_like(key)
    return torch.autograd.grad(total, leaves, materialize_grads=True)


@pytest.mark.parametrize("name", OPS)
@given(problems_with_rows())
def test_reference_is_a_reduction_of_dense_attention(name: str, case: tuple[Problem, torch.Tensor]) -> None:
    problem, rows = case
    inputs = problem.query[rows.long()], problem.key, problem.layout, rows
    torch.testing.assert_close(
        OPS[name][1](*inputs, **problem.options), dense(name, *inputs, **problem.options), rtol=1e-10, atol=1e-10
    )
    with backends.use(backend="reference"):
        ours = gradients(OPS[name][0], *inputs, **problem.options)
    for a, b in zip(ours, dense_gradients(name, *inputs, **problem.options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


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
    truths = dense_gradients(name, query.double(), key.double(), layout, rows)
    eager = dense_gradients(name, query, key, layout, rows)
    for ours, a, b in zip(gradients(op, query, key, layout, rows), eager, truths, strict=True):
        assert_close(ours, a, b)


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


@pytest.mark.usefixtures("poisoned_memory")
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
        grad_query, grad_key = gradients(OPS[name][0], query, key, layout, rows)
        assert grad_query.shape == query.shape
        assert grad_key.shape == key.shape
        assert not grad_key.any()


@pytest.mark.usefixtures("poisoned_memory", "one_thread")
@pytest.mark.parametrize("name", OPS)
@given(problems_with_rows())
def test_gradients_of_every_isa_and_dtype(name: str, case: tuple[Problem, torch.Tensor]) -> None:
    problem, rows = case
    for dtype in DTYPES:
        inputs = problem.query.to(dtype)[rows.long()], problem.key.to(dtype)
        truth = dense_gradients(name, *(t.double() for t in inputs), problem.layout, rows, **problem.options)
        eager = dense_gradients(name, *inputs, problem.layout, rows, **problem.options)
        for isa in backends.available_isas():
            with backends.use(backend="cpu", isa=isa):
                ours = gradients(OPS[name][0], *inputs, problem.layout, rows, **problem.options)
            for of, a, b, c in zip("qk", ours, eager, truth, strict=True):
                assert a.dtype == dtype
                assert_close(a, b, c, f"{isa} {dtype} d{of}")


@pytest.mark.parametrize("pattern", ["block", "causal"])
@pytest.mark.parametrize("name", OPS)
def test_gradients_do_not_depend_on_threads_or_on_other_lists(name: str, pattern: str) -> None:
    op = OPS[name][0]
    lengths = [(5, [900, 0, 7], 6), (3, [40] * 5, 70)]
    layout = BlockLayout.from_lengths(lengths, pattern)
    rows = torch.randint(0, layout.num_tokens, (40,), generator=torch.Generator().manual_seed(1))
    rows = torch.cat([rows, rows[:3]])
    query, key = tensors(layout, rows)
    out = op(query, key, layout, rows)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))

    def run(threads: int, layout: BlockLayout, select: torch.Tensor, tokens: slice) -> tuple[torch.Tensor, ...]:
        leaves = query[select].requires_grad_(), key[tokens].requires_grad_()
        torch.set_num_threads(threads)
        out = op(*leaves, layout, rows[select] - tokens.start)
        mine = upstream[select, :, : layout.max_documents] if name == "document_logsumexp" else upstream[tokens]
        return torch.autograd.grad(out, leaves, mine)

    before = torch.get_num_threads()
    try:
        everything = torch.arange(rows.numel()), slice(0, layout.num_tokens)
        together = run(1, layout, *everything)
        for threads in (2, 5):
            assert all(map(torch.equal, together, run(threads, layout, *everything)))
        begin = 0
        for one in lengths:
            alone = BlockLayout.from_lengths([one], pattern)
            tokens = slice(begin, begin + alone.num_tokens)
            select = ((rows >= tokens.start) & (rows < tokens.stop)).nonzero()[:, 0]
            assert torch.equal(together[0][select], (parts := run(1, alone, select, tokens))[0])
            assert torch.equal(together[1][tokens], parts[1])
            begin = tokens.stop
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", OPS)
def test_gradients_of_more_rows_than_wait_at_once(name: str) -> None:
    """Query gradients of 2**22 numbers wait to be added; these pieces have 1.6 times as many."""
    layout = BlockLayout.from_lengths([(2, [3] * 50, 64)])
    rows = every_tail_row(layout)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows.numel(), 16, 128, generator=generator)
    key = torch.randn(layout.num_tokens, 8, 128, generator=generator)
    truths = dense_gradients(name, query.double(), key.double(), layout, rows)
    eager = dense_gradients(name, query, key, layout, rows)
    for ours, a, b in zip(gradients(OPS[name][0], query, key, layout, rows), eager, truths, strict=True):
        assert_close(ours, a, b)


def test_nan_where_no_gradient_is_stays_there(isa: str) -> None:
    layout = BlockLayout.from_lengths([(4, [6, 5, 7], 3)])
    rows = torch.tensor([23, 24])
    query, key = tensors(layout, rows)
    upstream = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    upstream[..., 1] = 0
    upstream[1, 2] = 0

    def run(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = query.clone().requires_grad_(), key.clone().requires_grad_()
        return torch.autograd.grad(document_logsumexp(*leaves, layout, rows), leaves, upstream)

    clean = run(query, key)
    assert not clean[0][1, 2].any()
    key[10:15] = float("nan")
    query[1, 2] = float("nan")
    for a, b in zip(clean, run(query, key), strict=True):
        assert torch.equal(a, b)


def test_nan_gradient_of_a_document_shows(isa: str) -> None:
    layout = BlockLayout.from_lengths([(4, [6, 5, 0, 7], 3), (1, [2], 2)])
    rows = torch.tensor([24, 29])
    leaves = [leaf.requires_grad_() for leaf in tensors(layout, rows)]
    upstream = torch.zeros(2, 4, 4)
    upstream[0, :, 2] = upstream[1, :, 1:] = float("inf")  # of documents without tokens and of none
    upstream[0, 0, 1] = float("nan")
    grad_query, grad_key = torch.autograd.grad(document_logsumexp(*leaves, layout, rows), leaves, upstream)
    assert grad_query[0, 0].isnan().all()
    assert grad_key[10:15, 0].isnan().all()
    grad_query[0, 0] = grad_key[10:15, 0] = 0
    assert not grad_query.any()
    assert not grad_key.any()


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
    result = OPS[name][0](query, key, layout, rows).detach()
    backward = getattr(torch.ops.rankernel, f"{name}_backward").default
    torch.library.opcheck(backward, (torch.ones_like(result), result, query.detach(), key.detach(), *arguments[2:]))


@pytest.mark.parametrize("name", OPS)
def test_compile_is_one_graph_without_recompiling(name: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(OPS[name][0], backend=counter, fullgraph=True)
    for documents in ([9, 1, 0, 40], [10, 10, 10, 20], [1, 9, 25, 15]):
        layout = BlockLayout.from_lengths([(5, documents, 6)])
        rows = torch.tensor([58, 59])
        leaves = [leaf.requires_grad_() for leaf in tensors(layout, rows)]
        ours, eager = (function(*leaves, layout, rows) for function in (compiled, OPS[name][0]))
        torch.testing.assert_close(ours, eager, equal_nan=True)
        upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
        for a, b in zip(*(torch.autograd.grad(out, leaves, upstream) for out in (ours, eager)), strict=True):
            assert torch.equal(a, b)
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
    layout.list_offsets[1] = 8  # the first list has more documents than any had
    with pytest.raises(ValueError, match="layout: its cu_seqlens"):
        OPS[name][0](query, key, layout, rows)
    layout.cu_seqlens[1] = 10_000
    with pytest.raises(ValueError, match="layout: its cu_seqlens"):
        OPS[name][0](query, key, layout, rows)
