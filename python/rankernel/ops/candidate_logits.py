"""Logits, or log-probabilities, of a few candidate tokens, without those of the vocabulary; forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch

from rankernel import _C, backends, reference
from rankernel.ops import _checks

_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor candidates, Tensor? bias, float scale, float? softcap, bool log_probs, "
    "bool sparse_grad"
)
_checks.LIBRARY.define(f"candidate_logits({_ARGUMENTS}) -> (Tensor, Tensor)")
_checks.LIBRARY.define(
    f"candidate_logits_backward(Tensor grad, Tensor logits, Tensor lse, bool[] wanted, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor)"
)

_CHUNK = 8192
"""Vocabulary entries whose logits the backward of log-probabilities holds at once."""

_CHUNK_ELEMENTS = 1 << 22
"""Gathered weights that the backward holds at once where every row has candidates of its own."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)  # no fake tensor or other subclass


def candidate_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    candidates: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    log_probs: bool = False,
    sparse_grad: bool = False,
) -> torch.Tensor:
    """Logits of a few vocabulary entries at a few positions, computed from these entries' weights alone.

    ``z = softcap * tanh(scale * (h . W_v + b_v) / softcap)``, in the order in which models apply them, accumulated and
    returned in float32, so that close documents do not tie as bfloat16 logits do. With ``log_probs`` the log-sum-exp
    over the whole vocabulary is subtracted; the weights are streamed once and their logits never stored: each part of
    the vocabulary leaves a maximum and a sum per row. Differentiable, once, in hidden, weight and bias. The result is
    bit by bit the same for any number of threads, and on the CPU for any other rows in the batch.

    Args:
        hidden: [B, E], float32, bfloat16 or float16: final hidden states, already normed. Under autocast it is brought
            to the dtype of weight.
        weight: [V, E], the output embedding; dtype and device of hidden.
        candidates: [C] or [B, C] integers in [0, V): the entries, the same for all rows or each row's own, in any
            order, repetitions allowed. Out of range they are an error on the CPU and NaN on CUDA.
        bias: [V], dtype of weight.
        scale: multiplies the logits (``logit_scale``, or 1 / ``logits_scaling``).
        softcap: ``final_logit_softcapping``.
        log_probs: log-probabilities over the vocabulary instead of logits.
        sparse_grad: the gradient of weight is a sparse COO tensor of the candidates' rows, uncoalesced, as
            ``torch.nn.functional.embedding(sparse=True)`` gives it. Not with ``log_probs``, whose gradient is dense.

    Returns:
        float32 [B, C] (float64 for float64 inputs, which run the reference).

    Raises:
        ValueError: shapes, devices, candidates or numbers that do not fit, naming the argument.
        TypeError: a wrong dtype.
    """
    if not -math.inf < scale < math.inf:  # not isfinite, which dynamo cannot ask of a symbolic number
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a positive finite number or None, got {softcap}")
    if sparse_grad and log_probs:
        raise ValueError("sparse_grad: expected False with log_probs, whose gradient touches the whole vocabulary")
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(weight.dtype)
    arguments = (hidden, weight, candidates, bias, float(scale), softcap, log_probs, sparse_grad)
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    if torch.compiler.is_compiling() or type(hidden) not in _PLAIN or type(weight) not in _PLAIN:
        return torch.ops.rankernel.candidate_logits(*arguments)[0]
    # The way through the dispatcher costs more than the dot products of a few candidates.
    return _Eager.apply(*arguments) if differentiable else _forward(*arguments)[0]


def _check(
    hidden: torch.Tensor, weight: torch.Tensor, candidates: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Checks the arguments; returns candidates as int64, last dimension contiguous."""
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.dim() != 2:
            raise ValueError(f"{name}: expected 2 dimensions, got shape {list(tensor.shape)}")
    _checks.check_same("weight", weight, "hidden", hidden)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: expected the hidden size, {hidden.shape[1]}, got shape {list(weight.shape)}")
    if candidates.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"candidates: expected integers, got {candidates.dtype}")
    if candidates.dim() not in (1, 2) or (candidates.dim() == 2 and candidates.shape[0] != hidden.shape[0]):
        raise ValueError(
            f"candidates: expected shape [C] or [{hidden.shape[0]}, C] as hidden has rows, got {list(candidates.shape)}"
        )
    if candidates.device != hidden.device:
        raise ValueError(f"candidates: expected the device of hidden, {hidden.device}, got {candidates.device}")
    if bias is not None:
        _checks.check_same("bias", bias, "weight", weight)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
    return candidates.to(torch.int64).contiguous()


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    candidates: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    log_probs: bool,
    sparse_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result [B, C], and with ``log_probs`` the log-sum-exp of every row [B], else an empty tensor."""
    candidates = _check(hidden, weight, candidates, bias)
    implementation = backends.implementation_for(hidden)
    if backends.native_refused("candidate_logits", _checks.why_no_kernel_of(implementation, hidden), implementation):
        return _in_pytorch(hidden, weight, candidates, bias, scale, softcap, log_probs)
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    if implementation == "triton":
        with torch.cuda.device(hidden.device):
            kernels = _checks.gpu_kernels("candidate_logits", "triton")
            return kernels.candidate_logits(hidden, weight, candidates, bias, scale, softcap, log_probs)
    num_rows, num_candidates = hidden.shape[0], candidates.shape[-1]
    out = hidden.new_empty((num_rows, num_candidates), dtype=torch.float32)
    lse = hidden.new_empty((num_rows if log_probs else 0,), dtype=torch.float32)
    arguments = (
        _checks.NATIVE_DTYPES[hidden.dtype],
        (hidden.data_ptr(), hidden.stride(0)),
        (weight.data_ptr(), weight.stride(0)),
        (candidates.data_ptr(), num_candidates if candidates.dim() == 2 else 0),
        0 if bias is None else bias.data_ptr(),
        (num_rows, weight.shape[0], hidden.shape[1], num_candidates),
        scale,
        softcap or 0.0,
        out.data_ptr(),
        lse.data_ptr() if log_probs else 0,
    )
    if implementation == "cuda":
        extension = _checks.gpu_kernels("candidate_logits", "cuda")
        with torch.cuda.device(hidden.device):
            size = extension.candidate_logits_workspace(num_rows, weight.shape[0], log_probs)
            workspace = hidden.new_empty(size, dtype=torch.uint8)
            stream = torch.cuda.current_stream().cuda_stream
            torch.cuda.check_error(extension.candidate_logits(*arguments, workspace.data_ptr(), stream))
    elif _C.candidate_logits(backends.isa_level(), *arguments, torch.get_num_threads()):
        _checks.check_candidates(candidates, weight.shape[0])
    return out, lse


def _in_pytorch(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    candidates: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    log_probs: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _checks.check_candidates(candidates, weight.shape[0])
    options: dict[str, Any] = {"bias": bias, "scale": scale, "softcap": softcap}
    logits = reference.candidate_logits(hidden, weight, candidates, **options)
    if not log_probs:
        return logits, logits.new_empty(0)
    every = torch.arange(weight.shape[0], device=weight.device)
    lse = reference.candidate_logits(hidden, weight, every, **options).logsumexp(dim=-1)
    return logits - lse[:, None], lse


def _slope(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor | float:
    """Derivative of the logits in ``h . W + b``."""
    return scale if softcap is None else scale * (1 - (logits / softcap).square())


def _backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    lse: torch.Tensor,
    wanted: list[bool],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    candidates: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    log_probs: bool,
    sparse_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight (with ``sparse_grad`` its touched rows) and bias; empty where not wanted."""
    candidates = candidates.to(torch.int64)
    if log_probs:
        return _backward_of_log_probs(grad, logits, lse, hidden, weight, candidates, bias, scale, softcap, wanted)
    grad = grad * _slope(logits, scale, softcap)  # of h . W + b, [B, C]
    wide = grad.dtype
    shared = candidates.dim() == 1
    grad_hidden, grad_weight, grad_bias = (grad.new_empty(0, dtype=hidden.dtype) for _ in range(3))
    if wanted[0] and shared:
        grad_hidden = (grad @ weight[candidates].to(wide)).to(hidden.dtype)
    elif wanted[0]:
        grad_hidden = hidden.new_empty(hidden.shape)
        for rows in _row_chunks(candidates, weight.shape[1]):
            gathered = weight[candidates[rows]].to(wide)
            grad_hidden[rows] = torch.bmm(grad[rows, None], gathered)[:, 0].to(hidden.dtype)
    if wanted[1] and shared:
        grad_weight = (grad.T @ hidden.to(wide)).to(weight.dtype)
        if not sparse_grad:
            grad_weight = weight.new_zeros(weight.shape).index_add_(0, candidates, grad_weight)
    elif wanted[1] and sparse_grad:
        grad_weight = (grad[..., None] * hidden[:, None].to(wide)).flatten(0, 1).to(weight.dtype)
    elif wanted[1]:
        touched, places = candidates.unique(return_inverse=True)
        sums = grad.new_zeros(touched.numel(), weight.shape[1])
        for rows in _row_chunks(candidates, weight.shape[1]):
            products = grad[rows, :, None] * hidden[rows, None].to(wide)
            sums.index_add_(0, places[rows].flatten(), products.flatten(0, 1))
        grad_weight = weight.new_zeros(weight.shape)
        grad_weight[touched] = sums.to(weight.dtype)
    if wanted[2]:
        per_candidate = grad.sum(dim=0) if shared else grad.flatten()
        sums = grad.new_zeros(weight.shape[0]).index_add_(0, candidates.flatten(), per_candidate)
        grad_bias = sums.to(weight.dtype)
    return grad_hidden, grad_weight, grad_bias


def _row_chunks(candidates: torch.Tensor, hidden_size: int) -> list[slice]:
    num_rows, num_candidates = candidates.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, num_candidates * hidden_size))
    return [slice(begin, begin + step) for begin in range(0, num_rows, step)]


def _backward_of_log_probs(
    grad: torch.Tensor,
    logits: torch.Tensor,
    lse: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    candidates: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``dz_bv = sum_c g_bc ([v = c] - p_bv)``, the logits of one part of the vocabulary computed anew at a time."""
    grad_hidden = grad.new_zeros(hidden.shape) if wanted[0] else grad.new_empty(0)
    grad_weight = weight.new_empty(weight.shape if wanted[1] else 0)
    grad_bias = weight.new_empty(weight.shape[:1] if wanted[2] else 0)
    total = grad.sum(dim=1, keepdim=True)
    candidates = candidates.expand(grad.shape)
    for begin in range(0, weight.shape[0], _CHUNK):
        end = min(begin + _CHUNK, weight.shape[0])
        part = torch.arange(begin, end, device=weight.device)
        z, _ = _forward(hidden, weight, part, bias, scale, softcap, False)
        of_logits = -total * (z - lse[:, None]).exp()
        inside = (candidates >= begin) & (candidates < end)
        of_logits.scatter_add_(1, (candidates - begin).clamp(0, end - begin - 1), grad * inside)
        of_logits *= _slope(z, scale, softcap)
        if wanted[0]:
            grad_hidden += of_logits.to(weight.dtype) @ weight[begin:end]
        if wanted[1]:
            grad_weight[begin:end] = of_logits.to(weight.dtype).T @ hidden
        if wanted[2]:
            grad_bias[begin:end] = of_logits.sum(dim=0)
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def _fake(
    hidden: torch.Tensor, weight: torch.Tensor, candidates: torch.Tensor, bias: Any, scale: float, softcap: Any,
    log_probs: bool, *_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = hidden.shape[0]
    shape = (rows, candidates.shape[-1])
    return hidden.new_empty(shape, dtype=wide), hidden.new_empty(rows if log_probs else 0, dtype=wide)


def _fake_backward(
    grad: torch.Tensor, logits: Any, lse: Any, wanted: list[bool], hidden: torch.Tensor, weight: torch.Tensor,
    candidates: torch.Tensor, bias: Any, scale: float, softcap: Any, log_probs: bool, sparse_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    rows = (candidates.numel(), weight.shape[1]) if sparse_grad else weight.shape
    return (
        hidden.new_empty(hidden.shape if wanted[0] else (0,)),
        weight.new_empty(rows if wanted[1] else (0,)),
        weight.new_empty(weight.shape[:1] if wanted[2] else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs, output)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:4])
    ctx.rest = inputs[4:]
    ctx.backends = backends.kept()


def _autograd(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    logits, lse, hidden, weight, candidates, bias = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[place] for place in (0, 1, 3)]
    arguments = (grad, logits, lse, wanted, hidden, weight, candidates, bias, *ctx.rest)
    with ctx.backends():
        grad_hidden, grad_weight, grad_bias = torch.ops.rankernel.candidate_logits_backward(*arguments)
    if wanted[1] and ctx.rest[-1]:
        places = candidates.flatten()[None].to(torch.int64)
        grad_weight = torch.sparse_coo_tensor(places, grad_weight, weight.shape, check_invariants=False)
    grads = (grad_hidden, grad_weight, None, grad_bias)
    used = (wanted[0], wanted[1], False, wanted[2])
    return tuple(found if use else None for found, use in zip(grads, used, strict=True)) + (None,) * 4


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    backward = staticmethod(_autograd)


_checks.LIBRARY.impl("candidate_logits", _forward, "CompositeExplicitAutograd")
_checks.LIBRARY.impl("candidate_logits_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("rankernel::candidate_logits", _fake, lib=_checks.LIBRARY)
torch.library.register_fake("rankernel::candidate_logits_backward", _fake_backward, lib=_checks.LIBRARY)
torch.library.register_autograd(
    "rankernel::candidate_logits", _autograd, setup_context=_setup_context, lib=_checks.LIBRARY
)
