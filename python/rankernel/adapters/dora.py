"""DoRA, weight-decomposed low-rank adaptation (Liu et al., arXiv 2402.09353), without a dense update of the weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rankernel.adapters.lora import LoRALinear
from rankernel.ops import lora_update
from rankernel.ops.lora_linear import Weight, dense_weight

_BLOCK = 2**20  # elements in float32 at a time: they stay in the cache


def row_norm(weight: torch.Tensor) -> torch.Tensor:
    """Euclidean norms of the rows: [O, I] to [O], float32 (float64 of float64)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.cat([torch.linalg.vector_norm(rows.to(wide), dim=1) for rows in _blocks(weight)])


@torch.no_grad()
def dora_norm(
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    weight_norm: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norms of the rows of ``W + s B A``, which is never made.

    ``n^2 = |W|^2 + 2 s rowsum((W A^T) B) + s^2 rowsum((B (A A^T)) B)``: one pass over W and products of rank size.
    Rounding of ``n^2`` is relative to ``|W|^2``; where the update all but cancels a row of W, ``n^2`` is taken to be at
    least one float32 unit of that.

    Args:
        weight: [O, I], or a function that returns it.
        lora_A: [r, I], dtype of weight or float32.
        lora_B: [O, r], dtype of lora_A.
        scaling: s.
        weight_norm: [O], :func:`row_norm` of the weight, which a caller with a frozen weight may keep.

    Returns:
        [O], float32 (float64 for a float64 weight), without gradient.
    """
    dense = dense_weight(weight)
    if weight_norm is None:
        weight_norm = row_norm(dense)
    # The op returns x A^T in float32 as its last result; W stands for x, and the layer beside it has no outputs.
    *_, products = torch.ops.rankernel.lora_linear(
        dense, [dense[:0]], [dense.new_empty(0)], [lora_A], [lora_B[:0]], None, [1.0], [0], None, None, 0.0, None, False
    )
    wide = weight_norm.dtype
    with torch.autocast(dense.device.type, enabled=False):
        a, b = lora_A.to(wide), lora_B.to(wide)
        update = scaling * (b * torch.addmm(2 * products, b, a @ a.T, alpha=scaling)).sum(dim=1)
    square = weight_norm.square()
    return torch.maximum(square + update, torch.finfo(wide).eps * square).sqrt()


def dora_linear(
    x: torch.Tensor,
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    weight_norm: torch.Tensor | None = None,
) -> torch.Tensor:
    """``g (x W^T + s x A^T B^T) + b`` with ``g = magnitude / dora_norm(W, A, B, s)``, the norm without gradient.

    Values and gradients are those of PEFT's DoRA without dropout. The base product is rounded to the dtype of x before
    and after g, which is applied to it as ``y + (g - 1) y``, so that a g near 1 is not rounded itself. The adapter's
    part takes g into lora_B, in lora_B's dtype.

    Args:
        x: [..., I]; see :func:`rankernel.lora_linear`, also for weight, lora_A, lora_B and scaling.
        magnitude: [O], float32 or the dtype of x.
        bias: [O], dtype of x.
        weight_norm: see :func:`dora_norm`.

    Returns:
        [..., O], dtype of x.

    Raises:
        ValueError, TypeError: as :func:`rankernel.lora_linear`.
    """
    gain = magnitude / dora_norm(weight, lora_A, lora_B, scaling, weight_norm)
    base = F.linear(x, dense_weight(weight))
    base = _Scale.apply(base, gain)
    if bias is not None:
        base = base + bias.to(base.dtype)
    return lora_update(base, x.to(base.dtype), lora_A, (gain[:, None] * lora_B).to(lora_B.dtype), scaling)


class DoRALinear(LoRALinear):
    """:func:`dora_linear` as a module; ``magnitude``, in float32, starts as the norms of W's rows. See LoRALinear."""

    def __init__(self, base: torch.nn.Linear, rank: int, scaling: float, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(base, rank, scaling, dtype=dtype)
        self.magnitude = torch.nn.Parameter(row_norm(base.weight.detach()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O]."""
        weight, bias = self.base.weight, self.base.bias
        return dora_linear(x, weight, self.lora_A, self.lora_B, self.scaling, self.magnitude, bias=bias)


class _Scale(torch.autograd.Function):
    """``y gain``: y [..., O] of any dtype, gain [O] in float32."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        excess = (gain - 1).to(y.dtype)
        ctx.save_for_backward(y, excess)
        ctx.dtype = gain.dtype
        return torch.addcmul(y, y, excess)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        y, excess = ctx.saved_tensors
        grad_gain = None
        if ctx.needs_input_grad[1]:
            grad_gain = torch.zeros_like(excess, dtype=ctx.dtype)
            for part, grads in zip(_blocks(y), _blocks(grad), strict=True):
                grad_gain += (part.to(ctx.dtype) * grads).sum(dim=0)
        return torch.addcmul(grad, grad, excess) if ctx.needs_input_grad[0] else None, grad_gain


def _blocks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    matrix = tensor.reshape(-1, tensor.shape[-1])
    return matrix.split(max(1, _BLOCK // max(1, matrix.shape[1])))
