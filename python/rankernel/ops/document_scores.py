"""What a few query rows attend to: log-sum-exp per document, attention mass per token; forward and backward."""

from __future__ import annotations

from typing import Any

import torch

from rankernel import _C, backends, reference
from rankernel.layout import BlockLayout
from rankernel.ops import _checks

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor rows, Tensor cu_seqlens, Tensor list_offsets, bool causal, SymInt max_documents, "
    "float scale, float? softcap"
)
for _op in ("document_logsumexp", "token_attention_mass"):
    _checks.LIBRARY.define(f"{_op}({_ARGUMENTS}) -> Tensor")
    _checks.LIBRARY.define(f"{_op}_backward(Tensor grad, Tensor result, {_ARGUMENTS}) -> (Tensor, Tensor)")


def document_logsumexp(
    query: torch.Tensor,
    key: torch.Tensor,
    layout: BlockLayout,
    rows: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Log-sum-exp of each query row's attention logits over the tokens it sees of every document of its list.

    This is the one score primitive: BlockRank's document score is a softmax over the last dimension and a mean over
    rows and heads (arXiv 2510.05396, section 3.2). No window and no sinks: they do not belong to a document's score.
    Differentiable in query and key.

    Args:
        query: [R, Hq, D], float32, bfloat16 or float16, the query rows alone.
        key: [T, Hkv, D], Hkv divides Hq; dtype and device of query.
        layout: where the lists lie, on the device of query.
        rows: [R] integers, packed position of every query row, in any order. Out of range they are an error on the CPU
            and NaN on CUDA.
        scale: multiplies the logits; 1 / sqrt(D) by default.
        softcap: logits become softcap * tanh(logits / softcap).

    Returns:
        float32 [R, Hq, max_documents], natural log; -inf where a list has fewer documents, a document is empty, or the
        row does not see it.

    Raises:
        ValueError: shapes, devices, positions or numbers that do not fit, naming the argument.
        TypeError: a wrong dtype, or a layout that is none.
    """
    return _call(torch.ops.rankernel.document_logsumexp, query, key, layout, rows, scale, softcap)


def token_attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    layout: BlockLayout,
    rows: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention that every packed token receives from the query rows of its list.

    Softmax over all keys that a row sees, mean over the rows of a list, sum over heads: the per-layer token score of
    ICR (arXiv 2410.02642, section 3). Differentiable in query and key.

    Args:
        query: [R, Hq, D], float32, bfloat16 or float16, the query rows alone.
        key: [T, Hkv, D], Hkv divides Hq; dtype and device of query.
        layout: where the lists lie, on the device of query.
        rows: [R] integers, packed position of every query row, in any order. Out of range they are an error on the CPU
            and of no list on CUDA.
        scale: multiplies the logits; 1 / sqrt(D) by default.
        softcap: logits become softcap * tanh(logits / softcap).

    Returns:
        float32 [T]; the tokens of a list with rows sum to Hq, those of a list without are zero.

    Raises:
        ValueError: shapes, devices, positions or numbers that do not fit, naming the argument.
        TypeError: a wrong dtype, or a layout that is none.
    """
    return _call(torch.ops.rankernel.token_attention_mass, query, key, layout, rows, scale, softcap)


def _call(
    op: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    layout: BlockLayout,
    rows: torch.Tensor,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    _checks.check_layout(layout, key=key)
    scale = _checks.check_scale(query.shape[-1], scale, softcap)
    return op(
        query, key, rows, layout.cu_seqlens, layout.list_offsets, layout.causal, layout.max_documents,
        scale, softcap,
    )  # fmt: skip


def _check(query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Checks the arguments; returns rows as contiguous int64."""
    _checks.check_heads(query, key)
    _checks.check_device(cu_seqlens, query)
    if rows.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"rows: expected integers, got {rows.dtype}")
    if rows.shape != query.shape[:1]:
        raise ValueError(f"rows: expected shape [{query.shape[0]}], one position per query row, got {list(rows.shape)}")
    if rows.device != query.device:
        raise ValueError(f"rows: expected the device of query, {query.device}, got {rows.device}")
    return rows.to(torch.int64).contiguous()


def _run(
    op: str,
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    cu_seqlens: torch.Tensor,
    list_offsets: torch.Tensor,
    causal: bool,
    max_documents: int,
    scale: float,
    softcap: float | None,
    out: torch.Tensor,
    *gradients: torch.Tensor,
) -> None:
    """Calls a native kernel; ``out`` and the gradients are contiguous, and in the order of the bindings."""
    heads = (query.shape[1], key.shape[1], query.shape[2])
    num_segments = cu_seqlens.numel() - 1
    arguments = (
        _checks.NATIVE_DTYPES[query.dtype],
        _checks.address(query),
        _checks.address(key),
        rows.data_ptr(),
        rows.numel(),
        out.data_ptr(),
        max_documents,
        (cu_seqlens.data_ptr(), list_offsets.data_ptr(), num_segments, list_offsets.numel() - 1, causal),
        key.shape[0],
        heads,
        scale,
        softcap or 0.0,
    )
    addresses = [gradient.data_ptr() for gradient in gradients]
    if query.device.type == "cpu":
        if status := getattr(_C, op)(backends.isa_level(), *arguments, torch.get_num_threads(), *addresses):
            _checks.check_tokens(cu_seqlens, key=key)
            _checks.check_status(status, rows)
        return
    extension = _checks.gpu_kernels("document_scores", "cuda")
    with torch.cuda.device(query.device):
        size = extension.document_scores_workspace(
            op, rows.numel(), key.shape[0], num_segments, max_documents, heads
        )  # fmt: skip
        workspace = query.new_empty(size, dtype=torch.uint8)
        stream = torch.cuda.current_stream().cuda_stream
        torch.cuda.check_error(getattr(extension, op)(*arguments, *addresses, workspace.data_ptr(), stream))


def _implement(name: str, reference_forward: Any, reference_backward: Any, output_shape: Any) -> None:
    """Registers one of the two ops: implementation, fake, backward and autograd differ only in the given functions."""

    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        rows: torch.Tensor,
        cu_seqlens: torch.Tensor,
        list_offsets: torch.Tensor,
        causal: bool,
        max_documents: int,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        rows = _check(query, key, rows, cu_seqlens)
        implementation = backends.implementation_for(query)
        if backends.native_refused(name, _checks.why_no_kernel(query, implementation), implementation):
            _checks.check_tokens(cu_seqlens, key=key)
            if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < key.shape[0]:
                _checks.check_status(_checks.BAD_ROWS, rows)
            layout = _checks.layout_of(cu_seqlens, list_offsets, causal)
            return reference_forward(query, key, layout, rows, scale=scale, softcap=softcap)
        query, key = _checks.rows_contiguous(query), _checks.rows_contiguous(key)
        arguments = (query, key, rows, cu_seqlens, list_offsets, causal, max_documents, scale, softcap)
        if implementation == "triton":
            return getattr(_checks.gpu_kernels("document_scores", "triton"), name)(*arguments)
        out = query.new_empty(output_shape(query, key, max_documents), dtype=torch.float32)
        _run(name, *arguments, out)
        return out

    def fake(
        query: torch.Tensor,
        key: torch.Tensor,
        rows: torch.Tensor,
        cu_seqlens: torch.Tensor,
        list_offsets: torch.Tensor,
        causal: bool,
        max_documents: int,
        *_: Any,
    ) -> torch.Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        return query.new_empty(output_shape(query, key, max_documents), dtype=wide)

    def backward(
        grad: torch.Tensor,
        result: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        rows: torch.Tensor,
        cu_seqlens: torch.Tensor,
        list_offsets: torch.Tensor,
        causal: bool,
        max_documents: int,
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = _check(query, key, rows, cu_seqlens)
        implementation = backends.implementation_for(query)
        if backends.native_refused(name, _checks.why_no_kernel(query, implementation), implementation):
            layout = _checks.layout_of(cu_seqlens, list_offsets, causal)
            return reference_backward(grad, result, query, key, layout, rows, scale=scale, softcap=softcap)
        grad, result = grad.contiguous(), result.contiguous()
        query, key = _checks.rows_contiguous(query), _checks.rows_contiguous(key)
        arguments = (query, key, rows, cu_seqlens, list_offsets, causal, max_documents, scale, softcap)
        if implementation == "triton":
            kernels = _checks.gpu_kernels("document_scores", "triton")
            return getattr(kernels, f"{name}_backward")(grad, result, *arguments)
        grad_query = query.new_empty(query.shape, dtype=torch.float32)
        grad_key = key.new_empty(key.shape)
        _run(f"{name}_backward", *arguments, result, grad, grad_query, grad_key)
        return grad_query.to(query.dtype), grad_key

    def fake_backward(
        grad: torch.Tensor, result: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return query.new_empty(query.shape), key.new_empty(key.shape)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(output, *inputs[:5])
        ctx.rest = inputs[5:]
        ctx.backends = backends.kept()

    def autograd(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        op = getattr(torch.ops.rankernel, f"{name}_backward")
        with ctx.backends():
            grad_query, grad_key = op(grad, *ctx.saved_tensors, *ctx.rest)
        return (grad_query, grad_key) + (None,) * (3 + len(ctx.rest))

    library = _checks.LIBRARY
    library.impl(name, forward, "CompositeExplicitAutograd")
    library.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rankernel::{name}", fake, lib=library)
    torch.library.register_fake(f"rankernel::{name}_backward", fake_backward, lib=library)
    torch.library.register_autograd(f"rankernel::{name}", autograd, setup_context=setup_context, lib=library)


def _mass_backward(grad: torch.Tensor, result: torch.Tensor, *inputs: Any, **options: Any) -> Any:
    return reference.token_attention_mass_backward(grad, *inputs, **options)


_implement(
    "document_logsumexp",
    reference.document_logsumexp,
    reference.document_logsumexp_backward,
    lambda query, key, max_documents: (query.shape[0], query.shape[1], max_documents),
)
_implement(
    "token_attention_mass",
    reference.token_attention_mass,
    _mass_backward,
    lambda query, key, max_documents: (key.shape[0],),
)
