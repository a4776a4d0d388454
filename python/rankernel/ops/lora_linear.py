"""Linear layers with low-rank adapters: the base product by PyTorch, the adapters by our kernels around it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from rankernel import _C, backends, reference
from rankernel.ops import _checks
from rankernel.reference.lora_linear import Dropout, Segments, drop_threshold

_ARGUMENTS = (
    "Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] lora_A, Tensor[] lora_B, Tensor? gate, float[] scalings, "
    "int[] projections, Tensor? segment_offsets, Tensor? segment_adapters, float dropout_p, Tensor? seed, "
    "bool given_base"
)
_checks.LIBRARY.define(f"lora_linear({_ARGUMENTS}) -> Tensor[]")
_checks.LIBRARY.define(f"lora_linear_backward(Tensor?[] grads, Tensor sums, bool[] wanted, {_ARGUMENTS}) -> Tensor[]")

BAD_SEGMENTS = 5  # Status in csrc/types.h

Weight = torch.Tensor | Callable[[], torch.Tensor]
Adapter = tuple[torch.Tensor, torch.Tensor, float]


def lora_linear(
    x: torch.Tensor,
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    *,
    bias: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """A linear layer with a low-rank adapter: ``x W^T + b + s (gate * (drop(x) A^T)) B^T``.

    LoRA (Hu et al., arXiv 2106.09685); with ``scaling = alpha / sqrt(r)`` rsLoRA (arXiv 2312.03732). The base product
    is PyTorch's; ``S = x A^T`` stays in float32, and the update is added to the base product in place with one
    rounding. The backward reads the gradient of the result once for dS and dB and adds the adapter's part of dx in
    place. Neither x nor the adapters are copied to another dtype, and the dropout mask is drawn anew in registers
    where it is needed: beyond the results, memory is O(rows x r).

    Differentiable, once, in x, weight, bias, lora_A, lora_B and gate.

    Args:
        x: [..., I], float32, bfloat16 or float16. Under autocast x, weight and bias are brought to its dtype.
        weight: [O, I], dtype and device of x; or a function that returns it, called once in the forward and once in
            the backward pass, so that a weight that is stored quantised is never kept dense (its gradient then is
            not computed).
        lora_A: [r, I], dtype of x or float32, any strides.
        lora_B: [O, r], dtype of lora_A, any strides.
        scaling: multiplies the update.
        bias: [O], dtype of x.
        gate: [r], or [..., r] with the leading dimensions of x: multiplies the ranks (a learned mask, the prefix of
            DyLoRA, the experts of SMoRA).
        dropout_p: probability in [0, 1), in steps of 1 / 65536, that an element of x does not reach lora_A.
        generator: of the seed of dropout, on the CPU or the device of x; None: the default one of that device.

    Returns:
        [..., O], dtype of x.

    Raises:
        ValueError: shapes, devices or numbers that do not fit, naming the argument.
        TypeError: a wrong dtype.
    """
    if gate is not None and gate.dim() > 1:
        if gate.shape[:-1] != x.shape[:-1]:
            raise ValueError(f"gate: expected shape [r] or {[*x.shape[:-1], 'r']}, got {list(gate.shape)}")
        gate = gate.flatten(0, -2)
    call = _Call(gate, [scaling], [0], None, dropout_p, None)
    return _apply(x, [weight], [bias], [lora_A], [lora_B], call, generator)[0]


def lora_update(
    base: torch.Tensor,
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """``base + s (drop(x) A^T) B^T``: :func:`lora_linear` for a base result that something else computed.

    For layers whose product is not that of a dense weight, or not the last word on it: quantised kernels, DoRA. Where
    the base is a product of x and a weight, lora_linear is faster: it adds both gradients of x up in place.

    Args:
        base: [..., O], dtype and device of x; not modified.
        x: [..., I], and the other arguments, as of :func:`lora_linear`. Not affected by autocast.
        lora_A: [r, I].
        lora_B: [O, r].
        scaling: multiplies the update.
        dropout_p: of x.
        generator: of the seed of dropout.

    Returns:
        [..., O], dtype of x.

    Raises:
        ValueError, TypeError: as :func:`lora_linear`.
    """
    if base.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"base: expected shape {[*x.shape[:-1], 'O']} for this x, got {list(base.shape)}")
    call = _Call(None, [scaling], [0], None, dropout_p, None, given_base=True)
    with torch.autocast(x.device.type, enabled=False):
        rows = base.reshape(math.prod(base.shape[:-1]), base.shape[-1])
        return _apply(x, [rows], [None], [lora_A], [lora_B], call, generator)[0]


def multi_lora_linear(
    x: torch.Tensor,
    weights: Sequence[Weight],
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scalings: Sequence[float],
    *,
    biases: Sequence[torch.Tensor | None] | None = None,
    projections: Sequence[int] | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[torch.Tensor]:
    """Several linear layers on one input (q, k and v; gate and up), whose adapters share every pass over x.

    Args:
        x: [..., I]; see :func:`lora_linear`, also for the other arguments.
        weights: [O_p, I] of each layer p.
        lora_A: [r_t, I] of each adapter t.
        lora_B: [O_p, r_t] of each adapter, p its layer.
        scalings: of each adapter.
        biases: [O_p] or None, of each layer.
        projections: the layer of each adapter, in rising order; several of one layer are summed, none is allowed.
            None: adapter t belongs to layer t.
        dropout_p: one mask of x for all adapters.
        generator: of the seed of dropout.

    Returns:
        [..., O_p] of each layer.

    Raises:
        ValueError, TypeError: as :func:`lora_linear`.
    """
    chosen = list(range(len(weights)) if projections is None else projections)
    counts = {"lora_A": len(lora_A), "lora_B": len(lora_B), "scalings": len(scalings)}
    for name, count in counts.items():
        if count != len(chosen):
            raise ValueError(f"{name}: expected {len(chosen)}, one for each adapter, got {count}")
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"biases: expected {len(weights)}, one for each layer, got {len(biases)}")
    if any(not 0 <= p < len(weights) for p in chosen) or sorted(chosen) != chosen:
        raise ValueError(f"projections: expected rising numbers in [0, {len(weights)}), got {chosen}")
    call = _Call(None, list(scalings), chosen, None, dropout_p, None)
    given: list[torch.Tensor | None] = [None] * len(weights) if biases is None else list(biases)
    return _apply(x, list(weights), given, list(lora_A), list(lora_B), call, generator)


def segment_lora_linear(
    x: torch.Tensor,
    weight: Weight,
    adapters: Sequence[Adapter],
    segment_offsets: torch.Tensor,
    segment_adapters: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """A linear layer whose rows use different adapters, of different rank and scale; trainable.

    A row's result does not depend on the other rows, bit by bit on the CPU. See :func:`lora_linear`.

    Args:
        x: [N, I].
        weight: [O, I], or a function that returns it.
        adapters: (lora_A [r, I], lora_B [O, r], scaling) each; r may differ, and be 0.
        segment_offsets: [S + 1] integers that rise from 0 to N: segment i is rows
            [segment_offsets[i], segment_offsets[i + 1]). Anything else is an error on the CPU and undefined, but
            never out of bounds, on CUDA.
        segment_adapters: [S] integers, the adapter of each segment; -1: the base layer alone.
        bias: [O].
        gate: [R] or [N, R], R the largest rank; a row reads the first entries, as many as its adapter has ranks.
        dropout_p: see :func:`lora_linear`.
        generator: of the seed of dropout.

    Returns:
        [N, O], dtype of x.

    Raises:
        ValueError, TypeError: as :func:`lora_linear`.
    """
    if x.dim() != 2:
        raise ValueError(f"x: expected shape [N, I], got {list(x.shape)}")
    if any(len(adapter) != 3 for adapter in adapters):
        raise ValueError("adapters: expected (lora_A, lora_B, scaling) each")
    segments = Segments(
        _integers("segment_offsets", segment_offsets, x.device),
        _integers("segment_adapters", segment_adapters, x.device),
    )
    if segments.offsets.shape[0] != segments.adapters.shape[0] + 1:
        raise ValueError(
            f"segment_offsets: expected {segments.adapters.shape[0] + 1} numbers, one more than segment_adapters has, "
            f"got {segments.offsets.shape[0]}"
        )
    call = _Call(gate, [scaling for _, _, scaling in adapters], [0] * len(adapters), segments, dropout_p, None)
    return _apply(x, [weight], [bias], [a for a, _, _ in adapters], [b for _, b, _ in adapters], call, generator)[0]


def _integers(name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 or int32, got {tensor.dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected 1 dimension, got shape {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected the device of x, {device}, got {tensor.device}")
    return tensor.to(torch.int64).contiguous()


class _Call(NamedTuple):
    """What a call is made of beside the tensors that are differentiated."""

    gate: torch.Tensor | None
    scalings: list[float]
    projections: list[int]
    segments: Segments | None
    dropout_p: float
    seed: torch.Tensor | None
    given_base: bool = False  # the layers' base results stand for their weights

    @property
    def dropout(self) -> Dropout | None:
        return None if self.seed is None else Dropout(self.dropout_p, self.seed)

    def columns(self, lora_A: Sequence[torch.Tensor]) -> tuple[list[int], int]:
        """Where each adapter's ranks stand in a row of sums, and the length of a row."""
        ranks = [a.shape[0] for a in lora_A]
        if self.segments is not None:
            return [0] * len(ranks), max(ranks, default=0)
        ends = list(itertools.accumulate(ranks, initial=0))
        return ends[:-1], ends[-1]


def _apply(
    x: torch.Tensor,
    weights: list[Weight],
    biases: list[torch.Tensor | None],
    lora_A: list[torch.Tensor],
    lora_B: list[torch.Tensor],
    call: _Call,
    generator: torch.Generator | None,
) -> list[torch.Tensor]:
    if x.dim() == 0:
        raise ValueError("x: expected at least 1 dimension")
    if not 0 <= call.dropout_p < 1:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {call.dropout_p}")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        weights = [_cast(weight, dtype) for weight in weights]
        biases = [None if bias is None else bias.to(dtype) for bias in biases]
    if drop_threshold(call.dropout_p):
        device = x.device if generator is None else generator.device
        seed = torch.randint(2**63 - 1, (1,), generator=generator, device=device)
        call = call._replace(seed=seed.to(x.device))
    # -1 would be ambiguous without elements.
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    tensors = (rows, call.gate, *weights, *biases, *lora_A, *lora_B)
    plain, learns = True, False
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            plain &= type(tensor) in _PLAIN
            learns |= tensor.requires_grad
    if torch.compiler.is_compiling() or not plain:
        with torch.no_grad():  # as in eager calls, a weight that is made gets no gradient
            dense = [dense_weight(weight) for weight in weights]
        given = [rows.new_empty(0) if bias is None else bias for bias in biases]
        segments = (None, None) if call.segments is None else call.segments
        outs = torch.ops.rankernel.lora_linear(
            rows, dense, given, lora_A, lora_B, call.gate, call.scalings, call.projections, *segments,
            call.dropout_p, call.seed, call.given_base,
        )[:-1]  # fmt: skip
    # The way through the dispatcher costs as much as the adapter of a few rows.
    elif learns and torch.is_grad_enabled():
        outs = _Eager.apply(call, len(weights), len(lora_A), *tensors)
    else:
        outs, _, _ = _forward(rows, weights, biases, lora_A, lora_B, call)
    return list(outs) if x.dim() == 2 else [out.view(*x.shape[:-1], out.shape[-1]) for out in outs]


_PLAIN = (torch.Tensor, torch.nn.Parameter)  # no fake tensor or other subclass


def dense_weight(weight: Weight) -> torch.Tensor:
    """The weight itself, or what the function returns."""
    return weight if isinstance(weight, torch.Tensor) else weight()


def _cast(weight: Weight, dtype: torch.dtype) -> Weight:
    return weight.to(dtype) if isinstance(weight, torch.Tensor) else lambda: weight().to(dtype)


def _check(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    call: _Call,
) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    for weight, bias in zip(weights, biases, strict=True):
        _checks.check_same("base" if call.given_base else "weight", weight, "x", x)
        if call.given_base:
            continue
        if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
            raise ValueError(f"weight: expected shape [O, {x.shape[1]}] for this x, got {list(weight.shape)}")
        if bias is not None:
            _checks.check_same("bias", bias, "x", x)
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
    for a, b, projection, scaling in zip(lora_A, lora_B, call.projections, call.scalings, strict=True):
        size = weights[projection].shape[1 if call.given_base else 0]
        if a.dtype not in (x.dtype, torch.float32) or a.dtype != lora_A[0].dtype:
            raise TypeError(f"lora_A: expected {x.dtype} as x or torch.float32, the same for all, got {a.dtype}")
        if a.device != x.device:
            raise ValueError(f"lora_A: expected the device of x, {x.device}, got {a.device}")
        _checks.check_same("lora_B", b, "lora_A", a)
        if a.dim() != 2 or a.shape[1] != x.shape[1]:
            raise ValueError(f"lora_A: expected shape [r, {x.shape[1]}] for this x, got {list(a.shape)}")
        if b.shape != (size, a.shape[0]):
            raise ValueError(f"lora_B: expected shape {[size, a.shape[0]]}, got {list(b.shape)}")
        if not math.isfinite(scaling):
            raise ValueError(f"scaling: expected a finite number, got {scaling}")
    _, width = call.columns(lora_A)
    gate = call.gate
    if gate is not None:
        if not gate.dtype.is_floating_point:
            raise TypeError(f"gate: expected a floating-point tensor, got {gate.dtype}")
        if gate.device != x.device:
            raise ValueError(f"gate: expected the device of x, {x.device}, got {gate.device}")
        if gate.shape not in ((width,), (x.shape[0], width)):
            raise ValueError(f"gate: expected shape [{width}] or {[x.shape[0], width]}, got {list(gate.shape)}")


class _Kernels(NamedTuple):
    """The two kernels of one implementation, on rows and adapters of one call."""

    implementation: str  # or "reference"
    segments: Segments | None
    dropout: Dropout | None

    def shrink(
        self,
        x: torch.Tensor,
        factors: Sequence[torch.Tensor],
        scales: Sequence[float],
        columns: Sequence[int],
        *,
        dropout: bool,
        sums: torch.Tensor | None = None,
        coefficients: torch.Tensor | None = None,
        gradients: Sequence[torch.Tensor | None] = (),
    ) -> None:
        """See :func:`rankernel.reference.lora_linear.lora_shrink`."""
        chosen = self.dropout if dropout else None
        outputs: dict[str, Any] = {"sums": sums, "coefficients": coefficients, "gradients": gradients}
        if (module := self._of_tensors()) is not None:
            return module.lora_shrink(x, factors, scales, columns, self.segments, chosen, **outputs)
        wide = coefficients if sums is None else sums
        assert wide is not None, "nothing to compute"
        arguments = (
            (x.data_ptr(), x.stride(0)),
            (*x.shape, wide.shape[1]),
            _described(factors, scales, columns, gradients),
            (0, 0) if sums is None else (sums.data_ptr(), sums.stride(0)),
            (0, 0) if coefficients is None else (coefficients.data_ptr(), coefficients.stride(0)),
        )
        self._launch("lora_shrink", x, factors, arguments, chosen)

    def expand(
        self,
        out: torch.Tensor,
        coefficients: torch.Tensor,
        factors: Sequence[torch.Tensor],
        scales: Sequence[float],
        columns: Sequence[int],
        *,
        dropout: bool,
    ) -> None:
        """See :func:`rankernel.reference.lora_linear.lora_expand`."""
        chosen = self.dropout if dropout else None
        if (module := self._of_tensors()) is not None:
            return module.lora_expand(out, coefficients, factors, scales, columns, self.segments, chosen)
        arguments = (
            (out.data_ptr(), out.stride(0)),
            tuple(out.shape),
            _described(factors, scales, columns, ()),
            (coefficients.data_ptr(), coefficients.stride(0)),
        )
        self._launch("lora_expand", out, factors, arguments, chosen)

    def _of_tensors(self) -> Any:
        """The module whose functions take tensors, or None for an extension, which takes addresses."""
        if self.implementation == "reference":
            return reference
        return _checks.gpu_kernels("lora_linear", "triton") if self.implementation == "triton" else None

    def _launch(
        self, name: str, x: torch.Tensor, factors: Sequence[torch.Tensor], arguments: tuple[Any, ...],
        dropout: Dropout | None,
    ) -> None:  # fmt: skip
        dtypes = (_checks.NATIVE_DTYPES[x.dtype], _checks.NATIVE_DTYPES[factors[0].dtype])
        segments = (0, 0, 0)
        if self.segments is not None:
            offsets, adapters = self.segments
            segments = (offsets.data_ptr(), adapters.data_ptr(), adapters.shape[0])
        threshold = 0 if dropout is None else drop_threshold(dropout.probability)
        if self.implementation == "cuda":
            extension = _checks.gpu_kernels("lora_linear", "cuda")
            seed = 0 if dropout is None else dropout.seed.data_ptr()
            stream = torch.cuda.current_stream(x.device).cuda_stream
            with torch.cuda.device(x.device):
                torch.cuda.check_error(
                    getattr(extension, name)(*dtypes, *arguments, segments, (threshold, seed), stream)
                )
            return
        seed = 0 if dropout is None else int(dropout.seed)
        isa = backends.isa_level()
        status = getattr(_C, name)(isa, *dtypes, *arguments, segments, (threshold, seed), torch.get_num_threads())
        if status == BAD_SEGMENTS:
            raise ValueError(
                f"segment_offsets, segment_adapters: expected offsets that rise from 0 to {x.shape[0]} and adapters "
                f"in [-1, {len(factors)}), got {self.segments}"
            )


def _described(
    factors: Sequence[torch.Tensor],
    scales: Sequence[float],
    columns: Sequence[int],
    gradients: Sequence[torch.Tensor | None],
) -> list[tuple[Any, ...]]:
    """The factors as the bindings take them."""
    described = []
    for factor, scale, column, gradient in itertools.zip_longest(factors, scales, columns, gradients):
        found = (0, 0, 0) if gradient is None else (gradient.data_ptr(), *gradient.stride())
        described.append((factor.data_ptr(), factor.shape[0], *factor.stride(), column, scale, *found))
    return described


def _kernels(x: torch.Tensor, call: _Call) -> _Kernels:
    implementation = backends.implementation_for(x)
    if backends.native_refused("lora_linear", _checks.why_no_kernel_of(implementation, x), implementation):
        implementation = "reference"
    return _Kernels(implementation, call.segments, call.dropout)


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _of(projection: int, call: _Call) -> slice:
    """The adapters of a layer."""
    begin = call.projections.index(projection) if projection in call.projections else 0
    return slice(begin, begin + call.projections.count(projection))


def _new_sums(x: torch.Tensor, width: int) -> torch.Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(x.shape[0], width, dtype=dtype, device=x.device)


def _forward(
    x: torch.Tensor,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor | None],
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    call: _Call,
) -> tuple[list[torch.Tensor], torch.Tensor, _Kernels]:
    """The layers' results, ``S = x A^T`` of all adapters side by side, without scale and gate, and what ran."""
    dense = [dense_weight(weight) for weight in weights]
    _check(x, dense, biases, lora_A, lora_B, call)
    if call.given_base:
        outs = [base.clone(memory_format=torch.contiguous_format) for base in dense]
    else:
        outs = [F.linear(x, weight, bias) for weight, bias in zip(dense, biases, strict=True)]
    columns, width = call.columns(lora_A)
    sums = _new_sums(x, width)
    kernels = _kernels(x, call)
    if not sums.numel():
        return outs, sums, kernels
    x = _rows_contiguous(x)
    kernels.shrink(x, lora_A, [1.0] * len(lora_A), columns, dropout=True, sums=sums)
    gated = sums if call.gate is None else sums * call.gate
    for projection, out in enumerate(outs):
        own = _of(projection, call)
        if lora_B[own] and out.numel():
            factors = [b.T for b in lora_B[own]]
            kernels.expand(out, gated, factors, call.scalings[own], columns[own], dropout=False)
    return outs, sums, kernels


class _Gradients(NamedTuple):
    x: torch.Tensor | None
    gate: torch.Tensor | None
    weights: list[torch.Tensor | None]
    biases: list[torch.Tensor | None]
    lora_A: list[torch.Tensor | None]
    lora_B: list[torch.Tensor | None]


class _Wanted(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    gate: bool
    weights: list[bool]
    biases: list[bool]
    lora_A: list[bool]
    lora_B: list[bool]


def _backward(
    grads: Sequence[torch.Tensor | None],
    sums: torch.Tensor,
    wanted: _Wanted,
    x: torch.Tensor,
    weights: Sequence[Weight],
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    call: _Call,
    kernels: _Kernels,
) -> _Gradients:
    """METHODS.md section 9: ``dS = gate s dY B``, ``dB = s dY^T S``, ``dA = dS^T x``, ``dx = dY W + dS A``."""
    complete = all(grad is not None and grad.numel() for grad in grads)
    of_sums = torch.empty_like(sums) if complete else torch.zeros_like(sums)
    gated = sums if call.gate is None else sums * call.gate
    grad_A = [a.new_empty(a.shape) if want else None for a, want in zip(lora_A, wanted.lora_A, strict=True)]
    grad_B = [b.new_zeros(b.shape) if want else None for b, want in zip(lora_B, wanted.lora_B, strict=True)]
    grad_x: torch.Tensor | None = None
    grad_weights: list[torch.Tensor | None] = [None] * len(weights)
    grad_biases: list[torch.Tensor | None] = [None] * len(weights)
    x = _rows_contiguous(x)
    columns, _ = call.columns(lora_A)
    through = wanted.x or wanted.gate or any(wanted.lora_A)  # whether dS is wanted
    for projection, grad in enumerate(grads):
        if grad is None:
            continue
        grad = _rows_contiguous(grad)
        if wanted.x and call.given_base:
            grad_x = torch.zeros_like(x)
        elif wanted.x:
            dense = dense_weight(weights[projection])
            grad_x = grad @ dense if grad_x is None else grad_x.addmm_(grad, dense)
        if wanted.weights[projection] and not call.given_base:
            grad_weights[projection] = grad.T @ x
        if wanted.biases[projection]:
            grad_biases[projection] = grad.sum(dim=0)
        own = _of(projection, call)
        if not lora_B[own] or not sums.numel() or not grad.numel():
            continue
        learns = any(wanted.lora_B[own])
        if through or learns:
            part = slice(None) if call.segments else slice(columns[own][0], columns[own][-1] + len(lora_A[own][-1]))
            kernels.shrink(
                grad, [b.T for b in lora_B[own]], call.scalings[own], [c - columns[own][0] for c in columns[own]],
                dropout=False, sums=of_sums[:, part] if through else None,
                coefficients=gated[:, part] if learns else None,
                gradients=[None if g is None else g.T for g in grad_B[own]] if learns else (),
            )  # fmt: skip
    grad_gate = None
    if wanted.gate and call.gate is not None:
        grad_gate = (of_sums * sums).sum_to_size(call.gate.shape).to(call.gate.dtype)
    if call.gate is not None and through:
        of_sums *= call.gate
    if any(wanted.lora_A):
        if sums.numel() and x.numel():
            ones = [1.0] * len(lora_A)
            kernels.shrink(x, lora_A, ones, columns, dropout=True, coefficients=of_sums, gradients=grad_A)
        else:
            grad_A = [None if g is None else g.zero_() for g in grad_A]
    if grad_x is not None and sums.numel() and x.numel():
        kernels.expand(grad_x, of_sums, lora_A, [1.0] * len(lora_A), columns, dropout=True)
    if wanted.x and grad_x is None:
        grad_x = torch.zeros_like(x)
    return _Gradients(grad_x, grad_gate, grad_weights, grad_biases, grad_A, grad_B)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, num_weights: int, num_adapters: int, *inputs: Any) -> Any:
        x, _, *rest = inputs
        weights, biases = rest[:num_weights], rest[num_weights : 2 * num_weights]
        lora_A, lora_B = rest[2 * num_weights :][:num_adapters], rest[2 * num_weights + num_adapters :]
        ctx.backends = backends.kept()
        outs, sums, ctx.kernels = _forward(x, weights, biases, lora_A, lora_B, call)
        ctx.set_materialize_grads(False)
        # A function that makes a weight has no gradient to save for.
        ctx.call = call._replace(gate=None)
        ctx.makers = [None if isinstance(weight, torch.Tensor) else weight for weight in weights]
        kept = [weight if isinstance(weight, torch.Tensor) and not call.given_base else None for weight in weights]
        ctx.save_for_backward(sums, x, call.gate, *kept, *lora_A, *lora_B)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        sums, x, gate, *rest = ctx.saved_tensors
        num_weights, num_adapters = len(ctx.makers), len(ctx.call.projections)
        weights = [kept if maker is None else maker for maker, kept in zip(ctx.makers, rest[:num_weights], strict=True)]
        lora_A, lora_B = rest[num_weights : num_weights + num_adapters], rest[num_weights + num_adapters :]
        needs = ctx.needs_input_grad[3:]
        wanted = _Wanted(needs[0], needs[1], *_split(needs[2:], num_weights, num_adapters))
        call = ctx.call._replace(gate=gate)
        with ctx.backends():
            found = _backward(grads, sums, wanted, x, weights, lora_A, lora_B, call, ctx.kernels)
        if call.given_base:
            found = found._replace(weights=list(grads))
        return (None, None, None, found.x, found.gate, *found.weights, *found.biases, *found.lora_A, *found.lora_B)


def _split(flat: Sequence[Any], num_weights: int, num_adapters: int) -> tuple[list[Any], ...]:
    """A flat list to those of weights, biases, lora_A and lora_B."""
    ends = list(itertools.accumulate((num_weights, num_weights, num_adapters, num_adapters), initial=0))
    return tuple(list(flat[begin:end]) for begin, end in itertools.pairwise(ends))


def _call_of(
    gate: torch.Tensor | None, scalings: Sequence[float], projections: Sequence[int], offsets: torch.Tensor | None,
    adapters: torch.Tensor | None, dropout_p: float, seed: torch.Tensor | None, given_base: bool,
) -> _Call:  # fmt: skip
    segments = None if offsets is None or adapters is None else Segments(offsets, adapters)
    return _Call(gate, list(scalings), list(projections), segments, dropout_p, seed, given_base)


def _forward_op(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], lora_A: list[torch.Tensor],
    lora_B: list[torch.Tensor], *rest: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """As :func:`_forward`, the sums last; a bias of no elements stands for none."""
    given = [bias if bias.numel() else None for bias in biases]
    outs, sums, _ = _forward(x, weights, given, lora_A, lora_B, _call_of(*rest))
    return [*outs, sums]


def _fake(
    x: torch.Tensor, weights: list[torch.Tensor], biases: Any, lora_A: list[torch.Tensor], lora_B: Any, *rest: Any
) -> list[torch.Tensor]:
    call = _call_of(*rest)
    sizes = [weight.shape[1 if call.given_base else 0] for weight in weights]
    return [*(x.new_empty((x.shape[0], size)) for size in sizes), _new_sums(x, call.columns(lora_A)[1])]


def _backward_op(
    grads: list[torch.Tensor | None], sums: torch.Tensor, wanted: list[bool], x: torch.Tensor,
    weights: list[torch.Tensor], biases: Any, lora_A: list[torch.Tensor], lora_B: list[torch.Tensor], *rest: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """The gradients one after the other, without elements where there is none."""
    chosen = _Wanted(wanted[0], wanted[1], *_split(wanted[2:], len(weights), len(lora_A)))
    call = _call_of(*rest)
    found = _backward(grads, sums, chosen, x, weights, lora_A, lora_B, call, _kernels(x, call))
    flat = (found.x, found.gate, *found.weights, *found.biases, *found.lora_A, *found.lora_B)
    return [x.new_empty(0) if gradient is None else gradient for gradient in flat]


def _fake_backward(
    grads: list[torch.Tensor | None], sums: Any, wanted: list[bool], x: torch.Tensor, weights: list[torch.Tensor],
    biases: Any, lora_A: list[torch.Tensor], lora_B: list[torch.Tensor], gate: torch.Tensor | None, *rest: Any,
) -> list[torch.Tensor]:  # fmt: skip
    of_biases = [weight[:, 0] for weight in weights]
    likes = (x, gate, *weights, *of_biases, *lora_A, *lora_B)
    return [
        like.new_empty(like.shape) if like is not None and there else x.new_empty(0)
        for like, there in zip(likes, _present(wanted, grads), strict=True)
    ]


def _present(wanted: list[bool], grads: Sequence[torch.Tensor | None]) -> list[bool]:
    """Which gradients there are: those of weights and biases only where the layer's result has one."""
    used = [grad is not None for grad in grads] * 2
    end = 2 + len(used)
    of_layers = [want and use for want, use in zip(wanted[2:end], used, strict=True)]
    return [*wanted[:2], *of_layers, *wanted[end:]]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    x, weights, biases, lora_A, lora_B, gate, scalings, projections, offsets, adapters, dropout_p, seed, base = inputs
    if base:
        weights = [given.new_empty(0, given.shape[1]) for given in weights]  # not kept for the backward
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[-1], x, gate, offsets, adapters, seed, *weights, *biases, *lora_A, *lora_B)
    ctx.counts = len(weights), len(lora_A)
    ctx.rest = scalings, projections, dropout_p, base
    ctx.backends = backends.kept()


def _autograd(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    sums, x, gate, offsets, adapters, seed, *flat = ctx.saved_tensors
    weights, biases, lora_A, lora_B = _split(flat, *ctx.counts)
    scalings, projections, dropout_p, given_base = ctx.rest
    of_x, *of_lists, of_gate = ctx.needs_input_grad[:6]
    # A list without tensors needs no gradient and says so with one False.
    lists = [need if isinstance(need, list) else [] for need in of_lists]
    if given_base:  # whose gradient is that of the result
        lists[0] = [False]
    wanted = [of_x, of_gate, *itertools.chain(*lists)]
    with ctx.backends():
        found = torch.ops.rankernel.lora_linear_backward(
            grads[:-1], sums, wanted, x, weights, biases, lora_A, lora_B, gate, scalings, projections, offsets,
            adapters, dropout_p, seed, given_base,
        )  # fmt: skip
    of_x, of_gate, *rest = (
        gradient if there else None for gradient, there in zip(found, _present(wanted, grads[:-1]), strict=True)
    )
    of_lists = [found if found else None for found in _split(rest, *ctx.counts)]
    if given_base:
        of_lists[0] = grads[:-1]
    return of_x, *of_lists, of_gate, *(None,) * 7


_checks.LIBRARY.impl("lora_linear", _forward_op, "CompositeExplicitAutograd")
_checks.LIBRARY.impl("lora_linear_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("rankernel::lora_linear", _fake, lib=_checks.LIBRARY)
torch.library.register_fake("rankernel::lora_linear_backward", _fake_backward, lib=_checks.LIBRARY)
torch.library.register_autograd("rankernel::lora_linear", _autograd, setup_context=_setup_context, lib=_checks.LIBRARY)
