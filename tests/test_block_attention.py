"""block_attention: against float64 on random layouts, for every instruction set, dtype and option."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings

import rankernel
from attention_cases import DTYPES, Problem, assert_close, problems
from rankernel import BlockLayout, backends, block_attention, reference

LENGTHS = [(5, [9, 1, 0, 40], 6), (0, [3, 17], 2), (7, [], 0)]


def tensors(layout: BlockLayout, heads: int = 4, kv_heads: int = 2, size: int = 16, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(layout.num_tokens, h, size) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def dense(query, key, value, mask, softcap=None, sinks=None, scale=None):
    """Attention with the dense mask, float64: the definition that the reference is held against."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = torch.einsum("ihd,jhd->hij", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[:, None, None].expand(-1, query.shape[0], 1)], -1)
    weights = torch.softmax(logits, -1)[..., : key.shape[0]]
    return torch.einsum("hij,jhd->ihd", weights, value), torch.logsumexp(logits, -1).T


@given(problems())
def test_reference_is_dense_attention(problem: Problem) -> None:
    options = dict(problem.options)
    mask = problem.layout.dense_mask(window=options.pop("window"))
    expected = dense(problem.query, problem.key, problem.value, mask, **options)
    actual = reference.block_attention(problem.query, problem.key, problem.value, problem.layout, **problem.options)
    for ours, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("poisoned_memory")
@given(problems())
def test_every_isa_and_dtype(problem: Problem) -> None:
    for dtype in DTYPES:
        query, key, value = problem.inputs(dtype)
        copies = [t.clone() for t in (query, key, value)]
        wide = [t.double() for t in (query, key, value)]
        truth = reference.block_attention(*wide, problem.layout, **problem.options)
        eager = reference.block_attention(query, key, value, problem.layout, **problem.options)
        for isa in backends.available_isas():
            with backends.use(backend="cpu", isa=isa):
                ours = block_attention(query, key, value, problem.layout, return_lse=True, **problem.options)
                again = block_attention(query, key, value, problem.layout, return_lse=True, **problem.options)
            for name, a, b, c, d in zip(("out", "lse"), ours, eager, truth, again, strict=True):
                assert_close(a, b, c, f"{isa} {dtype} {name}")
                assert torch.equal(a, d), f"{isa} {dtype} {name}: two calls differ"
        for tensor, copy in zip((query, key, value), copies, strict=True):
            assert torch.equal(tensor, copy), "an input was changed"


@functools.cache
def long_results(pattern: str) -> tuple[BlockLayout, list, tuple, tuple]:
    layout = BlockLayout.from_lengths([(700, [1300, 600, 90], 530), (3, [40] * 30, 20)], pattern)
    inputs = tensors(layout, heads=2, kv_heads=1, size=32)
    eager = reference.block_attention(*inputs, layout, window=900)
    return layout, inputs, eager, reference.block_attention(*(t.double() for t in inputs), layout, window=900)


@pytest.mark.parametrize("pattern", ["block", "causal"])
def test_long_segments(isa: str, pattern: str) -> None:
    """More keys than one score strip, more rows than one span, several tasks per list."""
    layout, inputs, eager, truth = long_results(pattern)
    ours = block_attention(*inputs, layout, window=900, return_lse=True)
    for a, b, c in zip(ours, eager, truth, strict=True):
        assert_close(a, b, c, isa)


def test_threads_do_not_change_a_bit(isa: str) -> None:
    layout = BlockLayout.from_lengths([(20, [70, 130, 40] * 4, 25)] * 2)
    query, key, value = tensors(layout, dtype=torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(block_attention(query, key, value, layout))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_documents_do_not_see_each_other(isa: str) -> None:
    layout = BlockLayout.from_lengths([(4, [6, 5, 7], 3)])
    query, key, value = tensors(layout)
    before = block_attention(query, key, value, layout)
    key[10:15] = float("nan")
    value[10:15] = float("inf")
    after = block_attention(query, key, value, layout)
    assert torch.equal(before[:10], after[:10])
    assert torch.equal(before[15:22], after[15:22])
    assert not torch.isfinite(after[10:15]).any()


def test_order_of_documents_does_not_matter_to_them(isa: str) -> None:
    layout = BlockLayout.from_lengths([(4, [6, 6], 3)])
    query, key, value = tensors(layout)
    order = torch.cat([torch.arange(4), torch.arange(10, 16), torch.arange(4, 10), torch.arange(16, 19)])
    straight = block_attention(query, key, value, layout)
    swapped = block_attention(query[order], key[order], value[order], layout)
    assert torch.equal(straight[order][:16], swapped[:16])
    torch.testing.assert_close(straight[16:], swapped[16:], rtol=1e-5, atol=1e-6)


def test_large_logits_stay_finite(isa: str) -> None:
    layout = BlockLayout.from_lengths(LENGTHS)
    query, key, value = (t * s for t, s in zip(tensors(layout), (300.0, 300.0, 1.0), strict=True))
    ours = block_attention(query, key, value, layout)
    truth, _ = reference.block_attention(query.double(), key.double(), value.double(), layout)
    eager, _ = reference.block_attention(query, key, value, layout)
    assert_close(ours, eager, truth)


@pytest.mark.parametrize("lengths", [[], [(0, [], 0)], [(0, [0, 0], 0)] * 2])
def test_empty(isa: str, lengths: list) -> None:
    layout = BlockLayout.from_lengths(lengths)
    out, lse = block_attention(*tensors(layout), layout, return_lse=True)
    assert out.shape == (0, 4, 16)
    assert lse.shape == (0, 4)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8)  # each compiles nine kernels
@given(problems())
def test_triton_kernels(dtype: torch.dtype, problem: Problem) -> None:
    layout = problem.layout.to("cuda")
    inputs = problem.inputs(dtype)
    options = dict(problem.options)
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = []
    for wide in (dtype, torch.float64):
        leaves = [tensor.to(wide).requires_grad_() for tensor in inputs]
        out, lse = reference.block_attention(*leaves, problem.layout, **options)
        gradients = torch.autograd.grad(out, leaves, upstream.to(wide)) if layout.num_tokens else leaves
        expected.append((out.detach(), lse.detach(), *gradients))
    if "sinks" in options:
        options["sinks"] = options["sinks"].cuda()
    largest = [tensor.double().norm(dim=-1).max().item() if tensor.numel() else 0.0 for tensor in (upstream, inputs[2])]
    magnitude = largest[0] * largest[1] * max([1.0, *inputs[0].abs().flatten().tolist()])
    runs = []
    for _ in range(2):
        leaves = [tensor.cuda().requires_grad_() for tensor in inputs]
        with backends.use(backend="triton"):
            out, lse = block_attention(*leaves, layout, return_lse=True, **options)
            gradients = torch.autograd.grad(out, leaves, upstream.cuda()) if layout.num_tokens else leaves
        runs.append([out.detach(), lse.detach(), *gradients])
    names = ("out", "lse", "dq", "dk", "dv")
    for name, ours, again, eager, truth in zip(names, *runs, *expected, strict=True):
        assert torch.equal(ours, again), f"{name}: two calls differ"
        allowed = magnitude if name.startswith("d") else 0.0
        assert_close(ours.cpu(), eager, truth, f"{dtype} {name}", allowed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_graph_serves_other_layouts(dtype: torch.dtype) -> None:
    """Nothing waits for the host, and a layout's numbers are read when the graph runs."""
    layouts = [
        BlockLayout.from_lengths([(40, [100, 60, 800], 48)]),
        BlockLayout.from_lengths([(10, [500, 90, 400], 48)]),
    ]
    static = layouts[0].to("cuda")
    inputs = [tensor.cuda() for tensor in tensors(static, size=64, dtype=dtype)]
    block_attention(*inputs, static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_attention(*inputs, static)
    for layout in layouts:
        static.cu_seqlens.copy_(layout.cu_seqlens)
        graph.replay()
        assert torch.equal(out, block_attention(*inputs, layout.to("cuda")))


# Gradients


@pytest.mark.usefixtures("one_thread", "poisoned_memory")
@given(problems())
def test_gradients(problem: Problem) -> None:
    """Reference backward against autograd in float64; the op's gradients on every ISA and dtype within the bound."""
    if problem.layout.num_tokens == 0:
        return
    generator = torch.Generator().manual_seed(1)
    tokens, heads, size = problem.query.shape
    upstream = torch.randn(heads, tokens, size, generator=generator, dtype=torch.float64).transpose(0, 1)
    upstream_lse = torch.randn(heads, tokens, generator=generator, dtype=torch.float64).T

    def gradients(function, dtype: torch.dtype) -> list[torch.Tensor]:
        options = dict(problem.options)
        leaves = [t.to(dtype).detach().requires_grad_() for t in (problem.query, problem.key, problem.value)]
        if "sinks" in options:
            options["sinks"] = options["sinks"].to(torch.promote_types(dtype, torch.float32)).requires_grad_()
            leaves.append(options["sinks"])
        out, lse = function(*leaves[:3], problem.layout, **options)
        return torch.autograd.grad((out, lse), leaves, (upstream.to(out.dtype), upstream_lse.to(lse.dtype)))

    def op(*inputs, **options):
        return block_attention(*inputs, return_lse=True, **options)

    with backends.use(backend="reference"):
        exact = gradients(op, torch.float64)
    for ours, truth in zip(exact, gradients(reference.block_attention, torch.float64), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    for dtype in DTYPES:
        eager = gradients(reference.block_attention, dtype)
        inputs = [t.to(dtype).double() for t in (problem.query, problem.key, problem.value)]
        rounded = Problem(problem.layout, *inputs, problem.options)
        truth = _gradients_in_double(rounded, upstream.to(dtype), upstream_lse.float())
        # dS = P (dP - delta) may cancel: the terms are as large as dO . V, times Q or K.
        scale = problem.options["scale"] or problem.query.shape[-1] ** -0.5
        term = (upstream.norm(dim=-1).max() * inputs[2].norm(dim=-1).max()).item()
        magnitude = term * max(1.0, scale * inputs[0].abs().max().item(), scale * inputs[1].abs().max().item())
        for isa in backends.available_isas():
            with backends.use(backend="cpu", isa=isa):
                ours = gradients(op, dtype)
            for name, a, b, c in zip("qkvs", ours, eager, truth, strict=False):
                # delta = sum(dO out) takes out as it was rounded, so sinks in float32 gain nothing from their dtype.
                assert_close(a.to(dtype), b, c, f"{isa} {dtype} {name}", magnitude)


def _gradients_in_double(problem: Problem, upstream: torch.Tensor, upstream_lse: torch.Tensor) -> list[torch.Tensor]:
    options = dict(problem.options)
    leaves = [t.detach().requires_grad_() for t in (problem.query, problem.key, problem.value)]
    if "sinks" in options:
        options["sinks"] = options["sinks"].double().requires_grad_()
        leaves.append(options["sinks"])
    outputs = reference.block_attention(*leaves[:3], problem.layout, **options)
    return list(torch.autograd.grad(outputs, leaves, (upstream.double(), upstream_lse.double())))


def gradients_of(
    inputs: list[torch.Tensor], layout: BlockLayout, upstream: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, ...]:
    """Gradients of the op for query, key, value and, where there are any, sinks."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    if "sinks" in options:
        options["sinks"] = options["sinks"].detach().requires_grad_()
        leaves.append(options["sinks"])
    return torch.autograd.grad(block_attention(*leaves[:3], layout, **options), leaves, upstream)


@functools.cache
def long_gradients(pattern: str, dtype: torch.dtype) -> tuple[BlockLayout, list, torch.Tensor, list, list]:
    """A problem with segments longer than a chunk of rows and with several tasks, and its gradients by autograd."""
    lengths = [(1500, [], 0)] if pattern == "causal" else [(520, [560, 90], 520), (3, [40] * 20, 20)]
    layout = BlockLayout.from_lengths(lengths, pattern)
    inputs = tensors(layout, heads=2, kv_heads=1, dtype=dtype)
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for kind in (dtype, torch.float64):
        leaves = [t.to(kind).requires_grad_() for t in inputs]
        out, _ = reference.block_attention(*leaves, layout, window=650)
        results.append(torch.autograd.grad(out, leaves, upstream.to(kind)))
    return layout, inputs, upstream, *results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["block", "causal"])
def test_gradients_of_long_segments(isa: str, pattern: str, dtype: torch.dtype) -> None:
    layout, inputs, upstream, eager, truth = long_gradients(pattern, dtype)
    ours = gradients_of(inputs, layout, upstream, window=650)
    for name, a, b, c in zip("qkv", ours, eager, truth, strict=True):
        assert_close(a, b, c, f"{isa} {name}")


@pytest.mark.parametrize("pattern", ["block", "causal"])
def test_threads_do_not_change_a_bit_of_gradients(isa: str, pattern: str) -> None:
    layout = BlockLayout.from_lengths([(20, [70, 130, 40] * 4, 25)] * 2, pattern)
    inputs = tensors(layout, dtype=torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 5):
            torch.set_num_threads(count)
            results.append(gradients_of(inputs, layout, inputs[0], sinks=torch.zeros(4)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for first, other in zip(results[0], result, strict=True):
            assert torch.equal(first, other)


def test_gradients_of_lists_are_those_of_each_alone(isa: str) -> None:
    lengths = [(5, [9, 1, 0, 40], 6), (0, [300, 17, 100], 2), (7, [], 0), (0, [3], 4)]
    layouts = [BlockLayout.from_lengths(one) for one in (lengths, *([each] for each in lengths))]
    inputs = tensors(layouts[0])
    together = gradients_of(inputs, layouts[0], inputs[0])
    sizes = [layout.num_tokens for layout in layouts[1:]]
    alone = [
        gradients_of(list(parts), layout, parts[0])
        for layout, *parts in zip(layouts[1:], *(t.split(sizes) for t in inputs), strict=True)
    ]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_documents_get_no_gradients_from_each_other(isa: str) -> None:
    layout = BlockLayout.from_lengths([(4, [6, 5, 7], 3)])
    query, key, value = tensors(layout)
    upstream = torch.randn_like(query)
    before = gradients_of([query, key, value], layout, upstream)
    query[10:15] = float("nan")
    upstream[10:15] = float("inf")
    after = gradients_of([query, key, value], layout, upstream)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[4:10], b[4:10])
        assert torch.equal(a[15:], b[15:])
        assert not torch.isfinite(b[10:15]).any()
    assert torch.equal(before[0][:4], after[0][:4])
    assert not torch.isfinite(after[1][:4]).any()


@pytest.mark.parametrize("lengths", [[], [(0, [], 0)], [(0, [0, 0], 0)] * 2])
def test_gradients_of_nothing(isa: str, lengths: list) -> None:
    layout = BlockLayout.from_lengths(lengths)
    *gradients, grad_sinks = gradients_of(tensors(layout), layout, torch.zeros(0, 4, 16), sinks=torch.zeros(4))
    assert [gradient.shape[0] for gradient in gradients] == [0, 0, 0]
    assert torch.equal(grad_sinks, torch.zeros(4))


def test_backward_memory_is_linear() -> None:
    """60,000 tokens of short documents: less than twice the memory of the tensors themselves, no T^2 (14 GB) of any."""
    script = """
import resource, torch
from rankernel import BlockLayout, block_attention
torch.set_num_threads(2)
layout = BlockLayout.from_lengths([(32, [40] * 1498, 48)])
leaves = [torch.randn(layout.num_tokens, h, 64, requires_grad=True) for h in (4, 2, 2)]
out = block_attention(*leaves, layout)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.autograd.grad(out, leaves, torch.ones_like(out))
tensors = 2 * (2 * leaves[0].nbytes + 2 * leaves[1].nbytes)  # query, key, value and out, and their gradients
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / tensors)
"""
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 2


def test_gradcheck() -> None:
    layout = BlockLayout.from_lengths([(2, [3, 1], 2)])
    inputs = [t.double().requires_grad_() for t in tensors(layout, size=4)]
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def function(query, key, value, sinks):
        return block_attention(query, key, value, layout, sinks=sinks, softcap=2.0, window=4, return_lse=True)

    with backends.use(backend="reference"):
        assert torch.autograd.gradcheck(function, (*inputs, sinks))


# torch


def op_arguments(layout: BlockLayout, **options) -> tuple:
    query, key, value = tensors(layout)
    defaults = {"scale": 0.25, "window": None, "softcap": None} | options
    sinks = defaults.pop("sinks", None)
    return (
        *(t.requires_grad_() for t in (query, key, value)),
        layout.cu_seqlens, layout.list_offsets, sinks, False, *defaults.values(),
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"window": 4, "softcap": 2.0}, {"sinks": torch.zeros(4, requires_grad=True)}])
def test_opcheck(options: dict) -> None:
    arguments = op_arguments(BlockLayout.from_lengths(LENGTHS), **options)
    torch.library.opcheck(torch.ops.rankernel.block_attention.default, arguments)
    arguments = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    out, lse = torch.ops.rankernel.block_attention(*arguments)
    torch.library.opcheck(
        torch.ops.rankernel.block_attention_backward.default, (torch.ones_like(out), lse, out, lse, *arguments)
    )


def test_compile_is_one_graph_without_recompiling() -> None:
    def function(query, key, value, layout):
        return block_attention(query * 2, key, value, layout) + 1

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    # Boundaries and numbers of documents change nothing; another number of tokens compiles once more, for all others.
    same_tokens = [[9, 1, 0, 40], [10, 10, 10, 20], [30, 20], [50], [5] * 10]
    others = [[4] * 5, [25, 25, 1, 0, 2, 3, 9], [7, 8, 9]]
    for documents in same_tokens + others:
        layout = BlockLayout.from_lengths([(5, documents, 6)])
        inputs = [t.requires_grad_() for t in tensors(layout)]
        out = compiled(*inputs, layout)
        torch.testing.assert_close(out, function(*inputs, layout))
        out.sum().backward()
        assert counter.frame_count == (1 if documents in same_tokens else 2), "a new layout was compiled again"


def test_autocast_and_checkpointing() -> None:
    layout = BlockLayout.from_lengths(LENGTHS)
    query, key, value = tensors(layout)
    weight = torch.randn(16, 16, requires_grad=True)

    def function(query):
        return block_attention(query @ weight, (key @ weight), (value @ weight), layout)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert function(query).dtype == torch.bfloat16
    plain = torch.autograd.grad(function(query).sum(), weight)[0]
    checkpointed = torch.utils.checkpoint.checkpoint(function, query, use_reentrant=False)
    assert torch.equal(plain, torch.autograd.grad(checkpointed.sum(), weight)[0])


# Errors


BAD = {
    "query: expected 3 dimensions": (ValueError, {"query": lambda t: t[0]}),
    "query: expected 57": (ValueError, {"query": lambda t: t[1:]}),
    "query: expected a floating-point": (TypeError, {"query": lambda t: t.long()}),
    "key: expected the dtype of query": (TypeError, {"key": lambda t: t.bfloat16()}),
    "key: expected the head size": (ValueError, {"key": lambda t: t[..., :8]}),
    "key: expected a number of heads": (ValueError, {"key": lambda t: t[:, :0], "value": lambda t: t[:, :0]}),
    "key: expected 57": (ValueError, {"key": lambda t: t[1:], "value": lambda t: t[1:]}),
    "value: expected the shape of key": (ValueError, {"value": lambda t: t[..., :8]}),
    "value: expected the dtype": (TypeError, {"value": lambda t: t.half()}),
    "layout: expected a BlockLayout": (TypeError, {"layout": lambda _: [1, 2]}),
    "scale: expected": (ValueError, {"scale": -1.0}),
    "softcap: expected": (ValueError, {"softcap": 0.0}),
    "window: expected": (ValueError, {"window": 0}),
    "sinks: expected shape": (ValueError, {"sinks": torch.zeros(3)}),
    "sinks: expected a floating-point": (TypeError, {"sinks": torch.zeros(4, dtype=torch.int64)}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    error, changes = BAD[message]
    layout = BlockLayout.from_lengths([(5, [9, 1, 0, 36], 6)])
    arguments = dict(zip(("query", "key", "value"), tensors(layout), strict=True)) | {"layout": layout}
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(error, match=message):
        block_attention(**arguments)


def test_damaged_layout_raises(isa: str) -> None:
    query, key, value = tensors(BlockLayout.from_lengths(LENGTHS))
    damages = [
        ("cu_seqlens", 1, 10_000),
        ("cu_seqlens", 0, -3),
        ("list_offsets", 1, 100),
        ("list_offsets", 0, 1),
        ("list_offsets", 1, 1),
    ]
    for name, index, number in damages:
        layout = BlockLayout.from_lengths(LENGTHS)
        getattr(layout, name)[index] = number
        with pytest.raises(ValueError, match="layout: its cu_seqlens"):
            block_attention(query, key, value, layout)
        with pytest.raises(ValueError, match="layout: its cu_seqlens"):
            torch.ops.rankernel.block_attention_backward(
                query, query[..., 0].contiguous(), query, query[..., 0].contiguous(), query, key, value,
                layout.cu_seqlens, layout.list_offsets, None, False, 1.0, None, None,
            )  # fmt: skip


def test_what_no_kernel_covers_runs_the_reference_with_a_warning() -> None:
    layout = BlockLayout.from_lengths(LENGTHS)
    query, key, value = (t.double() for t in tensors(layout))
    backends._warned.clear()
    with pytest.warns(UserWarning, match=r"no kernel for torch\.float64"):
        out = block_attention(query, key, value, layout)
    assert torch.equal(out, reference.block_attention(query, key, value, layout)[0])
    with backends.use(backend="cpu"), pytest.raises(NotImplementedError, match=r"no kernel for torch\.float64"):
        block_attention(query, key, value, layout)
    wide = tensors(layout, size=264)
    with pytest.warns(UserWarning, match="head sizes from 1 to 256"):
        block_attention(*wide, layout)


def test_dirty_scratch_memory_does_not_show() -> None:
    """glibc fills every allocation with 0x7f bytes: huge floats, NaN in half precision."""
    script = """
import torch
import torch._dynamo.testing
from rankernel import BlockLayout, backends, block_attention
layout = BlockLayout.from_lengths([(5, [9, 1, 0, 40, 600], 6), (0, [3, 17], 2)])
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    leaves = [torch.randn(layout.num_tokens, h, 24).to(dtype).requires_grad_() for h in (4, 2, 2)]
    for isa in backends.available_isas():
        with backends.use(isa=isa):
            out = block_attention(*leaves, layout, window=50)
            gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
            print(isa, dtype, *(t.double().sum().item() for t in (out, *gradients)))
"""
    outputs = []
    for perturb in ("0", "128"):
        environment = os.environ | {"MALLOC_PERTURB_": perturb}
        run = subprocess.run(
            [sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        outputs.append(run.stdout)
    assert outputs[0] == outputs[1]
    assert "nan" not in outputs[0]


def test_public_names() -> None:
    assert Path(rankernel.__file__).parent.name == "rankernel"
    for name in rankernel.__all__:
        assert hasattr(rankernel, name)
