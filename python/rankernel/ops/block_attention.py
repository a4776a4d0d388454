"""Block-sparse in-context-ranking attention, forward and backward."""

from __future__ import annotations

from typing import Any

import torch

from rankernel import _C, backends, reference
from rankernel.layout import BlockLayout
from rankernel.ops import _checks

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, Tensor list_offsets, Tensor? sinks, bool causal, "
    "float scale, int? window, float? softcap"
)
_checks.LIBRARY.define(f"block_attention({_ARGUMENTS}) -> (Tensor, Tensor)")
_checks.LIBRARY.define(
    "block_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over a packed row of lists ``[prefix][document]...[document][tail]`` (BlockRank, arXiv 2510.05396).

    A document sees its list's prefix and, causally, itself; the tail sees everything before it in its list. No mask
    tensor is built and keys and values are not repeated for grouped-query heads. Softmax and accumulation run in
    float32 (float64 for float64 input, which the reference computes). Differentiable in query, key, value and sinks.

    Args:
        query: [T, Hq, D], float32, bfloat16 or float16; T packed tokens. Any strides.
        key: [T, Hkv, D], Hkv divides Hq; dtype and device of query.
        value: [T, Hkv, D], likewise.
        layout: where the lists lie, on the device of query.
        scale: multiplies the logits; 1 / sqrt(D) by default.
        window: row i sees key j only if i - j < window, counted in packed tokens, as Transformers' sliding layers do.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118, section 2).
        sinks: [Hq], one learned logit per head that takes part in the softmax without a value (gpt-oss).
        return_lse: also return the log-sum-exp of every row.

    Returns:
        out [T, Hq, D], contiguous, in the dtype of query; with ``return_lse`` also lse [T, Hq], float32, the natural
        log of the softmax denominator, sinks included.

    Raises:
        ValueError: shapes, devices or numbers that do not fit, naming the argument.
        TypeError: a wrong dtype, or a layout that is none.
    """
    _checks.check_layout(layout, query=query, key=key)
    scale = _checks.check_scale(query.shape[-1], scale, softcap)
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 or None, got {window}")
    out, lse = torch.ops.rankernel.block_attention(
        query, key, value, layout.cu_seqlens, layout.list_offsets, sinks, layout.causal, scale, window,
        softcap,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    sinks: torch.Tensor | None,
) -> None:
    _checks.check_heads(query, key)
    if value.shape != key.shape:
        raise ValueError(f"value: expected the shape of key, {list(key.shape)}, got {list(value.shape)}")
    _checks.check_same("value", value, "query", query)
    _checks.check_device(cu_seqlens, query)
    if query.shape[0] != key.shape[0]:
        _checks.check_tokens(cu_seqlens, query=query, key=key)
    if sinks is not None:
        if sinks.shape != (query.shape[1],):
            raise ValueError(f"sinks: expected shape [{query.shape[1]}], one per query head, got {list(sinks.shape)}")
        if sinks.device != query.device:
            raise ValueError(f"sinks: expected the device of query, {query.device}, got {sinks.device}")
        if not sinks.dtype.is_floating_point:
            raise TypeError(f"sinks: expected a floating-point tensor, got {sinks.dtype}")


@torch.library.impl(_checks.LIBRARY, "block_attention", "CompositeExplicitAutograd")
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    list_offsets: torch.Tensor,
    sinks: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(query, key, value, cu_seqlens, sinks)
    if _refused(query):
        _checks.check_tokens(cu_seqlens, query=query)
        layout = _checks.layout_of(cu_seqlens, list_offsets, causal)
        return reference.block_attention(
            query, key, value, layout, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
    query, key, value = (_checks.rows_contiguous(tensor) for tensor in (query, key, value))
    sinks = _native_sinks(sinks)
    if query.device.type != "cpu":
        kernels = _checks.gpu_kernels("block_attention", "triton")
        with torch.cuda.device(query.device):
            return kernels.block_attention(
                query, key, value, cu_seqlens, list_offsets, sinks, causal, scale, window, softcap
            )
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:2], dtype=torch.float32)
    status = _C.block_attention(
        *_native_arguments(query, key, value, out, lse, cu_seqlens, list_offsets, sinks, causal, scale, window, softcap)
    )
    if status:
        _checks.check_tokens(cu_seqlens, query=query)
        _checks.check_status(status)
    return out, lse


def _refused(query: torch.Tensor) -> bool:
    """Whether the reference runs."""
    implementation = backends.implementation_for(query)
    why_not = _checks.why_no_kernel(query, implementation)
    if implementation == "cuda":
        why_not = "it has no kernel in CUDA C++"
    return backends.native_refused("block_attention", why_not, implementation)


def _native_sinks(sinks: torch.Tensor | None) -> torch.Tensor | None:
    return None if sinks is None else sinks.to(torch.float32).contiguous()


def _native_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    list_offsets: torch.Tensor,
    sinks: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Any, ...]:
    """What the native functions of both directions take. Addresses: the tensors must outlive the call."""
    return (
        backends.isa_level(),
        _checks.NATIVE_DTYPES[query.dtype],
        _checks.address(query),
        _checks.address(key),
        _checks.address(value),
        _checks.address(out),
        lse.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        (cu_seqlens.data_ptr(), list_offsets.data_ptr(), cu_seqlens.numel() - 1, list_offsets.numel() - 1, causal),
        query.shape[0],
        (query.shape[1], key.shape[1], query.shape[2]),
        scale,
        softcap or 0.0,
        window or 0,
        torch.get_num_threads(),
    )


@torch.library.register_fake("rankernel::block_attention", lib=_checks.LIBRARY)
def _fake(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=wide)


@torch.library.impl(_checks.LIBRARY, "block_attention_backward", "CompositeExplicitAutograd")
def _backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    list_offsets: torch.Tensor,
    sinks: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if _refused(query):
        layout = _checks.layout_of(cu_seqlens, list_offsets, causal)
        return reference.block_attention_backward(
            grad_out, grad_lse, lse, query, key, value, layout,
            scale=scale, window=window, softcap=softcap, sinks=sinks,
        )  # fmt: skip
    grad_out, out, query, key, value = map(_checks.rows_contiguous, (grad_out, out, query, key, value))
    grad_lse, lse = grad_lse.contiguous(), lse.contiguous()
    wide_sinks = _native_sinks(sinks)
    if query.device.type != "cpu":
        kernels = _checks.gpu_kernels("block_attention", "triton")
        with torch.cuda.device(query.device):
            grad_query, grad_key, grad_value, grad_sinks = kernels.block_attention_backward(
                grad_out, grad_lse, out, lse, query, key, value, cu_seqlens, list_offsets, wide_sinks, causal, scale,
                window, softcap,
            )  # fmt: skip
        return grad_query, grad_key, grad_value, query.new_empty(0) if sinks is None else grad_sinks.to(sinks.dtype)
    grad_query, grad_key, grad_value = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)
    )
    grad_sinks = query.new_empty(0) if wide_sinks is None else torch.empty_like(wide_sinks)
    status = _C.block_attention_backward(
        _checks.address(grad_out),
        grad_lse.data_ptr(),
        _checks.address(grad_query),
        _checks.address(grad_key),
        _checks.address(grad_value),
        grad_sinks.data_ptr(),
        *_native_arguments(
            query, key, value, out, lse, cu_seqlens, list_offsets, wide_sinks, causal, scale, window, softcap
        ),
    )
    _checks.check_status(status)
    return grad_query, grad_key, grad_value, grad_sinks if sinks is None else grad_sinks.to(sinks.dtype)


@torch.library.register_fake("rankernel::block_attention_backward", lib=_checks.LIBRARY)
def _fake_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    list_offsets: torch.Tensor,
    sinks: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_sinks = query.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), grad_sinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, cu_seqlens, list_offsets, sinks, *ctx.rest = inputs
    ctx.save_for_backward(*output, query, key, value, cu_seqlens, list_offsets, sinks)
    ctx.backends = backends.kept()


def _autograd(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *tensors, sinks = ctx.saved_tensors
    with ctx.backends():
        gradients = torch.ops.rankernel.block_attention_backward(grad_out, grad_lse, *tensors, sinks, *ctx.rest)
    grad_query, grad_key, grad_value, grad_sinks = gradients
    grad_sinks = None if sinks is None else grad_sinks
    return (grad_query, grad_key, grad_value, None, None, grad_sinks) + (None,) * len(ctx.rest)


torch.library.register_autograd(
    "rankernel::block_attention", _autograd, setup_context=_setup_context, lib=_checks.LIBRARY
)
