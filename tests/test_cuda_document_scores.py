"""The CUDA C++ kernels of document_scores on the host, by tests/native/cuda_on_host.h; and both GPU backends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import rankernel
from attention_cases import Problem, assert_close, problems
from rankernel import BlockLayout, backends, reference
from rankernel.layout import Pattern
from test_cuda import DTYPES, GPU_BACKENDS, Host, build_on_host
from test_document_scores import dense_gradients, tensors

OPS = ("document_logsumexp", "token_attention_mass")
every_op = pytest.mark.parametrize("name", OPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

PLACES = {
    "as it is": lambda x: x,
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "aligned": lambda x: F.pad(x, (8, 8), value=math.nan)[..., 8:-8],
    "unaligned": lambda x: F.pad(x, (1, 2), value=math.nan)[..., 1:-2],
}


@st.composite
def problems_with_rows(draw: st.DrawFn) -> tuple[Problem, torch.Tensor]:
    """Rows anywhere in the lists, in any order, several times, and outside of them."""
    problem = draw(problems(attention=False))
    tokens = problem.layout.num_tokens
    outside = st.sampled_from([-1, tokens, tokens + 5, -(2**40), 2**32, 2**62])
    row = st.one_of(*[st.integers(0, tokens - 1)] * 4, outside) if tokens else outside
    return problem, torch.tensor(draw(st.lists(row, max_size=9)), dtype=torch.int64)


def make_problem(
    lengths: list[tuple[int, list[int], int]], heads: tuple[int, int, int], pattern: Pattern = "block", **options: float
) -> Problem:
    """``heads``: query heads, KV heads, head size."""
    layout = BlockLayout.from_lengths(lengths, pattern)
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(layout.num_tokens, count, heads[2], generator=generator, dtype=torch.float64) for count in heads[:2]
    )
    return Problem(layout, query, key, key, dict(options))


def call(
    host: Host, op: str, query: torch.Tensor, key: torch.Tensor, layout: BlockLayout, rows: torch.Tensor,
    result: torch.Tensor | None = None, grad: torch.Tensor | None = None, scale: float | None = None,
    softcap: float | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """What an op writes: its result, or with ``grad`` the float32 gradient of query and that of key."""
    (num_rows, query_heads, head_size), (num_tokens, kv_heads, _) = query.shape, key.shape
    heads, num_segments = (query_heads, kv_heads, head_size), layout.cu_seqlens.numel() - 1
    written = [(torch.float32, query.shape), (key.dtype, key.shape)]
    if grad is None:
        by_document = op.startswith("document")
        written = [(torch.float32, (num_rows, query_heads, layout.max_documents) if by_document else (num_tokens,))]

    def native(*memory: int) -> int:
        *addresses, workspace = memory
        if grad is not None:
            addresses = [0 if result is None else result.data_ptr(), grad.data_ptr(), *addresses]
        return getattr(host.module, op)(
            DTYPES[query.dtype],
            (query.data_ptr(), *query.stride()[:2]),
            (key.data_ptr(), *key.stride()[:2]),
            rows.data_ptr(),
            num_rows,
            addresses[0],
            layout.max_documents,
            (
                layout.cu_seqlens.data_ptr(), layout.list_offsets.data_ptr(), num_segments,
                layout.list_offsets.numel() - 1, layout.causal,
            ),
            num_tokens,
            heads,
            head_size**-0.5 if scale is None else scale,
            softcap or 0.0,
            *addresses[1:],
            workspace,
            0,
        )  # fmt: skip

    sizes = tuple(math.prod(shape) * dtype.itemsize for dtype, shape in written)
    workspace = host.module.document_scores_workspace(
        op, num_rows, num_tokens, num_segments, layout.max_documents, heads
    )
    outputs = host.run(sizes, workspace, native)
    return [out.view(dtype).reshape(shape) for out, (dtype, shape) in zip(outputs, written, strict=True)]


def run(
    host: Host, name: str, query: torch.Tensor, key: torch.Tensor, layout: BlockLayout, rows: torch.Tensor,
    upstream: torch.Tensor, **options: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """Result, and gradients of query and key."""
    (out,) = call(host, name, query, key, layout, rows, **options)
    result = out if name == "document_logsumexp" else None
    grad_query, grad_key = call(host, f"{name}_backward", query, key, layout, rows, result, upstream, **options)
    return [out, grad_query.to(query.dtype), grad_key]


def check(
    host: Host, name: str, problem: Problem, rows: torch.Tensor, dtype: torch.dtype,
    query_place: str = "as it is", key_place: str = "as it is",
) -> None:  # fmt: skip
    layout, options = problem.layout, problem.options
    valid = (rows >= 0) & (rows < layout.num_tokens)
    own = rows[valid]
    query = torch.full((rows.numel(), *problem.query.shape[1:]), math.nan, dtype=dtype)
    query[valid] = problem.query.to(dtype)[own]
    key = problem.key.to(dtype)

    def in_pytorch(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = query[valid].to(dtype), key.to(dtype), layout, own
        return [getattr(reference, name)(*inputs, **options), *dense_gradients(name, *inputs, **options)]

    eager, truth = in_pytorch(dtype), in_pytorch(torch.float64)
    # That of dense_gradients(), and NaN where nothing may flow back from.
    upstream = torch.randn(truth[0].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).float()
    upstream[truth[0].isneginf()] = math.nan
    if name == "document_logsumexp":
        every = torch.full((rows.numel(), *upstream.shape[1:]), math.nan)
        every[valid] = upstream
        upstream = every
    ours = run(host, name, PLACES[query_place](query), PLACES[key_place](key), layout, rows, upstream, **options)
    if name == "document_logsumexp":
        assert ours[0][~valid].isnan().all()
        ours[0] = ours[0][valid]
    assert not ours[1][~valid].any()
    ours[1] = ours[1][valid]
    for what, a, b, c in zip(("forward", "dq", "dk"), ours, eager, truth, strict=True):
        assert_close(a, b, c, f"{name} {dtype} {what}")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(build_on_host(tmp_path_factory.getbasetemp()))


places = st.sampled_from(list(PLACES))


@every_op
@settings(max_examples=14)
@given(case=problems_with_rows(), dtype=st.sampled_from(list(DTYPES)), query_place=places, key_place=places)
def test_random_layouts(
    host: Host, name: str, case: tuple[Problem, torch.Tensor], dtype: torch.dtype, query_place: str, key_place: str
) -> None:
    check(host, name, *case, dtype, query_place, key_place)


# 16 bytes at a time or not, and columns that come in steps of 32, 64 and 128.
@every_op
@every_dtype
@pytest.mark.parametrize(
    ("head_size", "query_place", "key_place"),
    [
        (64, "aligned", "aligned"),
        (64, "unaligned", "aligned"),
        (64, "aligned", "unaligned"),
        (61, "aligned", "aligned"),
        (200, "aligned", "aligned"),
    ],
)
def test_alignment(host: Host, name: str, dtype: torch.dtype, head_size: int, query_place: str, key_place: str) -> None:
    problem = make_problem([(5, [9, 0, 40], 3)], (2, 1, head_size))
    check(host, name, problem, torch.tensor([54, 56, 20]), dtype, query_place, key_place)


@every_op
@pytest.mark.parametrize("pattern", ["block", "causal"])
def test_many_rows(host: Host, name: str, pattern: Pattern) -> None:
    """Tiles of rows begin with their lists, and the keys of a list are no longer cut in many parts."""
    lengths = [(3, [20, 1, 33], 12), (0, [7], 40), (40, [], 2), (2, [30], 0)]
    problem = make_problem(lengths, (24, 3, 8), pattern, softcap=3.0)
    generator = torch.Generator().manual_seed(3)
    rows = torch.cat([torch.randperm(problem.layout.num_tokens, generator=generator)[:140], torch.tensor([-1, 60, 60])])
    check(host, name, problem, rows, torch.float32)


@every_op
def test_tokens_after_the_last_list(host: Host, name: str) -> None:
    """Keys may have been padded."""
    problem = make_problem([(5, [9, 40], 6), (1, [3], 2)], (4, 2, 16))
    layout, rows = problem.layout, torch.tensor([58, 59, 65, 66, 80])
    query, key = torch.randn(5, 4, 16), problem.key.float()
    padded = F.pad(key, (0, 0, 0, 0, 0, 50), value=math.nan)
    is_mass = name == "token_attention_mass"
    upstream = torch.randn(len(padded) if is_mass else (5, 4, 2))
    ours = run(host, name, query, padded, layout, rows, upstream)
    expected = run(host, name, query, key, layout, rows, upstream[: len(key)] if is_mass else upstream)
    assert torch.equal(ours[1], expected[1])
    for a, b in ((ours[2], expected[2]), (ours[0], expected[0]))[: 2 if is_mass else 1]:
        assert torch.equal(a, F.pad(b, [0, 0] * (b.dim() - 1) + [0, 50]))
    if not is_mass:
        assert torch.equal(ours[0][:3], expected[0][:3])
        assert ours[0][3:].isnan().all()


@every_op
@pytest.mark.parametrize("lengths", [[], [(0, [], 0)], [(5, [9, 1], 6), (0, [], 0)]])
@pytest.mark.parametrize("num_rows", [0, 2])
def test_empty(host: Host, name: str, lengths: list[tuple[int, list[int], int]], num_rows: int) -> None:
    problem = make_problem(lengths, (4, 2, 16))
    layout, key = problem.layout, problem.key.bfloat16()
    query, rows = torch.full((num_rows, 4, 16), math.nan).bfloat16(), torch.full((num_rows,), -1)
    is_mass = name == "token_attention_mass"
    upstream = torch.ones((layout.num_tokens,) if is_mass else (num_rows, 4, layout.max_documents))
    out, grad_query, grad_key = run(host, name, query, key, layout, rows, upstream)
    assert not out.any() if is_mass else out.isnan().all()
    assert not grad_query.any()
    assert not grad_key.any()


@every_op
@settings(max_examples=10)
@given(data=st.data())
def test_damaged_layout_touches_nothing_outside(host: Host, name: str, data: st.DataObject) -> None:
    problem = make_problem([(5, [9, 1, 40], 6), (2, [30], 3)], (4, 2, 8))
    layout, numbers = problem.layout, st.sampled_from([0, 1, 2, 5, 7, 30, 61, 96, 97, 10_000, -1, -(2**31), 2**31 - 1])
    for tensor in (layout.cu_seqlens, layout.list_offsets):
        for index in range(tensor.numel()):
            if data.draw(st.booleans()):
                tensor[index] = data.draw(numbers)
    layout.max_documents = data.draw(st.sampled_from([0, 1, 3]))
    rows = torch.tensor(data.draw(st.lists(st.integers(-1, 97), max_size=12)), dtype=torch.int64)
    query, key = torch.randn(rows.numel(), 4, 8), problem.key.float()
    shape = (rows.numel(), 4, layout.max_documents) if name == "document_logsumexp" else (len(key),)
    call(host, name, query, key, layout, rows)
    # Some of the outputs may not be written, or by several blocks.
    call(host, f"{name}_backward", query, key, layout, rows, torch.zeros(shape), torch.ones(shape))


def test_nan_where_no_gradient_is_stays_there(host: Host) -> None:
    layout = BlockLayout.from_lengths([(4, [6, 5, 7], 3)])
    rows = torch.tensor([23, 24])
    query, key = tensors(layout, rows)
    upstream = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    upstream[..., 1] = 0
    upstream[1, 2] = 0
    clean = run(host, "document_logsumexp", query, key, layout, rows, upstream)
    assert not clean[1][1, 2].any()
    key[10:15] = query[1, 2] = math.nan
    ours = run(host, "document_logsumexp", query, key, layout, rows, upstream)
    assert ours[0][1, 2].isnan().all()
    assert ours[0][..., 1].isnan().all()
    assert torch.equal(ours[0][0][:, [0, 2]], clean[0][0][:, [0, 2]])
    for a, b in zip(ours[1:], clean[1:], strict=True):
        assert torch.equal(a, b)


def test_nan_gradient_of_a_document_shows(host: Host) -> None:
    layout = BlockLayout.from_lengths([(4, [6, 5, 0, 7], 3), (1, [2], 2)])
    rows = torch.tensor([24, 29])
    upstream = torch.zeros(2, 4, 4)
    upstream[0, :, 2] = upstream[1, :, 1:] = math.inf  # of documents without tokens and of none
    upstream[0, 0, 1] = math.nan
    _, grad_query, grad_key = run(host, "document_logsumexp", *tensors(layout, rows), layout, rows, upstream)
    assert grad_query[0, 0].isnan().all()
    assert grad_key[10:15, 0].isnan().all()
    grad_query[0, 0] = grad_key[10:15, 0] = 0
    assert not grad_query.any()
    assert not grad_key.any()


def test_nothing_flows_back_from_minus_infinity(host: Host) -> None:
    layout = BlockLayout.from_lengths([(4, [6, 5], 3)])
    rows = torch.tensor([16, 17])
    query, key = tensors(layout, rows)
    query[..., 0] = 1
    upstream = torch.ones(2, 4, 2)
    upstream[..., 0] = 0
    clean = run(host, "document_logsumexp", query, key, layout, rows, upstream)
    key[4:10, :, 0] = -math.inf
    out, *gradients = run(host, "document_logsumexp", query, key, layout, rows, torch.ones(2, 4, 2))
    assert out[..., 0].isneginf().all()
    for a, b in zip(gradients, clean[1:], strict=True):
        assert torch.equal(a, b)


@every_op
def test_nan_that_a_row_does_not_see(host: Host, name: str) -> None:
    problem = make_problem([(4, [6, 45, 7], 9), (1, [20], 2)], (4, 2, 16))
    rows = torch.tensor([20, 5, 60])  # in documents and in the prefix of the next list
    query, key, layout = problem.query.float()[rows], problem.key.float(), problem.layout
    upstream = torch.randn(layout.num_tokens if name == "token_attention_mass" else (3, 4, 3))
    before = run(host, name, query, key, layout, rows, upstream)
    seen = layout.dense_mask()[rows].any(dim=0)
    key[~seen] = math.nan
    for a, b in zip(run(host, name, query, key, layout, rows, upstream), before, strict=True):
        assert torch.equal(a, b)


@every_op
def test_too_many_lists_or_blocks_are_refused(host: Host, name: str) -> None:
    layout = BlockLayout.from_lengths([(1, [2], 1)])
    lists = torch.zeros(9, dtype=torch.int32)
    function = getattr(host.module, name)
    for num_lists, num_tokens, num_rows in ((2, 4, 0), (1, 2**31 - 1, 0), (1, 4, 2**31)):
        sizes = (layout.cu_seqlens.data_ptr(), lists.data_ptr(), 3, num_lists, False)
        arguments = (0, (0, 0, 0), (0, 0, 0), 0, num_rows, 0, 1, sizes, num_tokens, (1, 1, 8), 1.0, 0.0, 0, 0)
        assert function(*arguments) != 0


# A device.

DEVICE_PROBLEMS = {
    "tail": make_problem([(40, [100, 7, 0, 384], 20), (3, [80] * 12, 17)], (8, 2, 128)),
    "causal, softcap": make_problem([(33, [64, 65], 2), (0, [3], 1)], (6, 6, 64), "causal", softcap=3.0),
    "odd head size": make_problem([(5, [31, 32, 33], 4)], (7, 1, 33), scale=0.4),
    "large head size": make_problem([(7, [130, 90], 16)], (4, 2, 256)),
}
every_backend = pytest.mark.parametrize("backend", GPU_BACKENDS)


def device_rows(layout: BlockLayout) -> torch.Tensor:
    """The last tokens of every list and some inside, backwards."""
    last = [max(0, rows[-1][1] - n) for rows in layout.segments() for n in range(1, 9)]
    return torch.tensor([*last[::-1], 0, layout.num_tokens // 2, layout.num_tokens // 2])


def forward_and_gradients(
    name: str, query: torch.Tensor, key: torch.Tensor, layout: BlockLayout, rows: torch.Tensor, **options: Any
) -> list[torch.Tensor]:
    leaves = [query.detach().requires_grad_(), key.detach().requires_grad_()]
    out = getattr(rankernel, name)(*leaves, layout, rows, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grads = torch.autograd.grad(out, leaves, upstream.to(out).masked_fill(out.isneginf(), math.nan))
    return [out.detach(), *grads]


@pytest.mark.gpu
@every_backend
@every_op
@every_dtype
@pytest.mark.parametrize("problem", DEVICE_PROBLEMS.values(), ids=DEVICE_PROBLEMS)
def test_device_forward_and_gradients(backend: str, name: str, dtype: torch.dtype, problem: Problem) -> None:
    rows = device_rows(problem.layout)
    query, key = problem.query.to(dtype)[rows], problem.key.to(dtype)
    with backends.use(backend="reference"):
        truth, eager = (
            forward_and_gradients(name, query.to(of), key.to(of), problem.layout, rows, **problem.options)
            for of in (torch.float64, dtype)
        )
    inputs = query.cuda(), key.cuda(), problem.layout.to("cuda"), rows.cuda()
    with backends.use(backend=backend):
        ours = forward_and_gradients(name, *inputs, **problem.options)
        again = forward_and_gradients(name, *inputs, **problem.options)
    for what, a, b, c, same in zip(("forward", "dq", "dk"), ours, eager, truth, again, strict=True):
        assert torch.equal(a, same)
        assert_close(a.cpu(), b, c, f"{backend} {name} {what}")


@pytest.mark.gpu
@every_backend
def test_device_rows_in_no_list(backend: str) -> None:
    problem = DEVICE_PROBLEMS["tail"]
    good = torch.tensor([1500, 550, 3])
    rows = torch.tensor([-1, 1500, 2**40, 550, 3, problem.layout.num_tokens])
    query, key, layout = torch.randn(6, 8, 128).cuda(), problem.key.float().cuda(), problem.layout.to("cuda")
    with backends.use(backend=backend):
        out = rankernel.document_logsumexp(query, key, layout, rows.cuda())
        assert out[[0, 2, 5]].isnan().all()
        expected = rankernel.document_logsumexp(query[[1, 3, 4]], key, layout, good.cuda())
        torch.testing.assert_close(out[[1, 3, 4]], expected)
        mass = rankernel.token_attention_mass(query, key, layout, rows.cuda())
        assert mass.sum().item() == pytest.approx(16, abs=1e-4)


@pytest.mark.gpu
@every_backend
@every_op
def test_graph_replay_sees_new_inputs(backend: str, name: str) -> None:
    first, second = (make_problem([lengths], (8, 2, 64)) for lengths in ((5, [40, 90, 30], 9), (20, [80, 1, 64], 9)))
    rows, layout = first.layout.tail_positions(8).cuda(), first.layout.to("cuda")
    query, key = first.query.bfloat16().cuda()[rows], first.key.bfloat16().cuda()

    def compute() -> list[torch.Tensor]:
        leaves = [query.detach().requires_grad_(), key.detach().requires_grad_()]
        out = getattr(rankernel, name)(*leaves, layout, rows)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    with backends.use(backend=backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            before = compute()  # compiles and loads before capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = compute()
        key.copy_(2 * second.key)
        rows.sub_(3)
        layout.cu_seqlens.copy_(second.layout.cu_seqlens)
        graph.replay()
        for a, b, c in zip(captured, compute(), before, strict=True):
            assert torch.equal(a, b)
            assert not torch.equal(a, c)


@pytest.mark.gpu
@every_backend
@every_op
def test_runs_on_the_current_stream(backend: str, name: str) -> None:
    problem = DEVICE_PROBLEMS["tail"]
    rows, layout = problem.layout.tail_positions(16).cuda(), problem.layout.to("cuda")
    query, source = problem.query.bfloat16().cuda()[rows], problem.key.bfloat16().cuda()
    op = getattr(rankernel, name)
    with backends.use(backend=backend):
        expected = op(query, source, layout, rows)
        side, key = torch.cuda.Stream(), torch.zeros_like(source)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)  # the keys arrive late, on this stream
            key.copy_(source)
            ours = op(query, key, layout, rows)
        side.synchronize()
    assert torch.equal(ours, expected)
