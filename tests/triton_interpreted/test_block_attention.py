"""The Triton kernels of block_attention against the reference in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rankernel.triton_kernels import block_attention as kernels

from attention_cases import DTYPES, Problem, assert_close, problems
from rankernel import BlockLayout, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreted_dot")

Tensors = Sequence[torch.Tensor]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far ranges are split on small problems too."""
    monkeypatch.setattr(kernels, "CHUNK", 40)
    monkeypatch.setattr(kernels, "BLOCK", 4)


def options_of(problem: Problem, query: torch.Tensor) -> dict[str, object]:
    options = dict(problem.options)
    if options["scale"] is None:
        options["scale"] = query.shape[-1] ** -0.5
    return options


def run(inputs: Tensors, layout: BlockLayout, upstream: Tensors, options: dict[str, object]) -> list[torch.Tensor]:
    """out, lse and the gradients of query, key, value and, where there are any, sinks."""
    sinks = options.get("sinks")
    inputs = [tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in inputs]
    given = (
        *inputs, layout.cu_seqlens, layout.list_offsets, None if sinks is None else sinks.float(), layout.causal,
        options["scale"], options.get("window"), options["softcap"],
    )  # fmt: skip
    out, lse = kernels.block_attention(*given)
    gradients = kernels.block_attention_backward(*upstream, out, lse, *given)
    return [out, lse, *(gradient for gradient in gradients if gradient is not None)]


def run_reference(
    inputs: Tensors, layout: BlockLayout, upstream: Tensors, options: dict[str, object]
) -> list[torch.Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    wide = torch.promote_types(inputs[0].dtype, torch.float32)
    if "sinks" in options:
        options = options | {"sinks": options["sinks"].to(wide).requires_grad_()}
        leaves.append(options["sinks"])
    out, lse = reference.block_attention(*leaves[:3], layout, **options)
    gradients = torch.autograd.grad((out, lse), leaves, (upstream[0].to(out.dtype), upstream[1].to(lse.dtype)))
    return [out.detach(), lse.detach(), *gradients]


def check(problem: Problem, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = problem.inputs(dtype)
    upstream = (
        torch.randn(problem.query.shape, generator=generator).to(dtype),
        torch.randn(problem.query.shape[:2], generator=generator),
    )
    options = options_of(problem, inputs[0])
    truth = run_reference([tensor.double() for tensor in inputs], problem.layout, upstream, options)
    eager = run_reference(inputs, problem.layout, upstream, options)
    term = (upstream[0].double().norm(dim=-1).max() * inputs[2].double().norm(dim=-1).max()).item()
    magnitude = term * max(1.0, *(options["scale"] * t.abs().max().item() for t in inputs[:2]))
    ours = run(inputs, problem.layout, upstream, options)
    assert len(ours) == len(truth)
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), ours, eager, truth, strict=False):
        cast = a.to(dtype) if name == "dsinks" else a  # delta takes out as it was rounded
        assert_close(cast, b, c, f"{dtype} {name}", 0.0 if name in ("out", "lse") else magnitude)


@settings(max_examples=5)
@given(problems(), st.sampled_from(DTYPES))
def test_random_layouts(problem: Problem, dtype: torch.dtype) -> None:
    if problem.layout.num_tokens:
        check(problem, dtype)


@pytest.mark.usefixtures("small_parts")
@settings(max_examples=5)
@given(problems(), st.sampled_from(DTYPES))
def test_far_ranges_in_parts(problem: Problem, dtype: torch.dtype) -> None:
    if problem.layout.num_tokens:
        check(problem, dtype)


def test_windows_of_any_size() -> None:
    """A window that reaches past the list is none, also where positions behind it are no int32."""
    layout = BlockLayout.from_lengths([(3, [5], 2)])
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(layout.num_tokens, 2, 16, generator=generator) for _ in range(3)]
    upstream = torch.randn(inputs[0].shape, generator=generator), torch.zeros(layout.num_tokens, 2)
    without, *others = (
        run(inputs, layout, upstream, {"scale": 0.25, "softcap": None, "window": window})
        for window in (None, 10, 2**31 - 1, 2**31, 2**62)
    )
    for other in others:
        assert all(map(torch.equal, other, without))
