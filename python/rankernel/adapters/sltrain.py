"""SLTrain (Han et al., arXiv 2406.02214): pretraining with a sparse and a low-rank part in place of a weight."""

from __future__ import annotations

import math
from typing import Any

import torch

from rankernel.ops import lora_linear

_BLOCK = 2**20  # elements of a dense gradient that exist at a time


class SLTrainLinear(torch.nn.Module):
    """A linear layer with ``W = s B A + S``, S sparse on a fixed random support; A, B and S's values are trained.

    S is made dense for the product with x and again for the one with dY, and not kept between; A and B never meet. Of
    ``dS = dY^T x`` some rows exist at a time, of which the support is read.

    The support has the same number of columns in every row, random and uniform: the paper draws over the whole matrix,
    which differs by the chance that a row is short, and would need a search for the rows of a block.

    Args:
        in_features: I.
        out_features: O.
        rank: ``lora_A`` is [r, I], started as a linear layer's weight, ``lora_B`` [O, r], started at 0.
        scaling: s; alpha / rank in the paper.
        density: the share of a row that is in the support; at least one column.
        bias: whether there is one.
        generator: of the support, on the CPU.
        device: of the parameters.
        dtype: of the parameters; x has the same.
    """

    support: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scaling: float,
        *,
        density: float = 0.03,
        bias: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 < density <= 1:
            raise ValueError(f"density: expected a number in (0, 1], got {density}")
        self.scaling = scaling
        self.lora_A = torch.nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.lora_B = torch.nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        torch.nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        count = max(1, round(density * in_features))
        columns = [torch.randperm(in_features, generator=generator)[:count] for _ in range(out_features)]
        self.register_buffer("support", torch.stack(columns).to(device, torch.int32))
        self.values = torch.nn.Parameter(torch.empty(out_features, count, device=device, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        bound = 1 / math.sqrt(in_features)
        for parameter in (self.values, self.bias):
            if parameter is not None:
                torch.nn.init.uniform_(parameter, -bound, bound)

    def sparse(self) -> torch.Tensor:
        """S, dense: [O, I], without gradient."""
        zeros = self.values.new_zeros(len(self.values), self.lora_A.shape[1])
        return zeros.scatter_(1, self.support.long(), self.values.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O]."""
        y = lora_linear(x, self.sparse, self.lora_A, self.lora_B, self.scaling, bias=self.bias)
        return _SparseGradient.apply(y, self.values, x.detach(), self.support)

    def extra_repr(self) -> str:
        """The rank, the scale and the size of the support."""
        return f"rank={len(self.lora_A)}, scaling={self.scaling}, columns={self.support.shape[1]}"


class _SparseGradient(torch.autograd.Function):
    """y itself; the values of the sparse weight behind it get ``(dY^T x)[support]``."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, values: torch.Tensor, x: torch.Tensor, support: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, support)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, support = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None
        rows = x.reshape(-1, x.shape[-1]).to(grad.dtype)
        count = max(1, _BLOCK // rows.shape[1])
        parts = zip(grad.reshape(-1, grad.shape[-1]).split(count, dim=1), support.split(count), strict=True)
        found = [(part.T @ rows).gather(1, columns.long()) for part, columns in parts]
        return grad, torch.cat(found), None, None
