"""NOLA (Koohpayegani et al., arXiv 2310.02556): adapters that are combinations of random matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from rankernel.ops import lora_linear

_BLOCK = 16  # bases at a time; part of what a seed means where a generator's numbers depend on how many it draws


class NOLALinear(torch.nn.Module):
    """A frozen linear layer with ``A = sum_i a_i A_i`` and ``B = sum_j b_j B_j``; only a and b are trained and saved.

    The bases are uniform in (-1, 1) / sqrt(num_bases). They are drawn anew from the seed in every forward and backward
    pass, 16 at a time, and never kept. They come from PyTorch's generator of the device: a seed means the same bases
    on the same kind of device only, and drawing them takes most of the time on a CPU, where it is serial.

    a starts at random so that A is spread as in LoRA, b at 0.

    Args:
        base: the layer; its parameters are frozen and kept, not copied.
        rank: of A [r, I] and B [O, r], which are float32 and live as long as the graph of a call.
        scaling: multiplies the update.
        num_bases: of A, and of B.
        seed: of the bases; layers should differ. It is part of the state dict.
    """

    def __init__(
        self, base: torch.nn.Linear, rank: int, scaling: float, *, num_bases: int = 1024, seed: int = 0
    ) -> None:
        super().__init__()
        for name, value in (("rank", rank), ("num_bases", num_bases)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.scaling = scaling
        self.seed = seed
        device = base.weight.device
        self.a = torch.nn.Parameter(torch.randn(num_bases, device=device) / math.sqrt(base.in_features))
        self.b = torch.nn.Parameter(torch.zeros(num_bases, device=device))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, I] and B [O, r], differentiable in a and b."""
        size_out, size_in = self.base.weight.shape
        lora_A = _Combination.apply(self.a, 2 * self.seed, (self.rank, size_in))
        lora_B = _Combination.apply(self.b, 2 * self.seed + 1, (size_out, self.rank))
        return lora_A, lora_B

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O]."""
        return lora_linear(x, self.base.weight, *self.factors(), self.scaling, bias=self.base.bias)

    def get_extra_state(self) -> torch.Tensor:
        """The seed."""
        return torch.tensor(self.seed)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Takes the seed over."""
        self.seed = int(state)

    def extra_repr(self) -> str:
        """The rank, the scale and the bases."""
        return f"rank={self.rank}, scaling={self.scaling}, num_bases={len(self.a)}, seed={self.seed}"


class _Combination(torch.autograd.Function):
    """``sum_i c_i M_i``, and ``dc_i = <d, M_i>``."""

    @staticmethod
    def forward(ctx: Any, coefficients: torch.Tensor, seed: int, shape: tuple[int, int]) -> torch.Tensor:
        ctx.seed, ctx.number = seed, len(coefficients)
        total = coefficients.new_zeros(math.prod(shape))
        for part, bases in zip(coefficients.split(_BLOCK), _bases(seed, len(coefficients), total), strict=True):
            total.addmv_(bases.T, part)
        return total.view(shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad = grad.reshape(-1)
        return torch.cat([bases.mv(grad) for bases in _bases(ctx.seed, ctx.number, grad)]), None, None


def _bases(seed: int, number: int, like: torch.Tensor) -> Iterator[torch.Tensor]:
    """Blocks of [16, size of like], scaled."""
    generator = torch.Generator(like.device).manual_seed(seed)
    bound = 1 / math.sqrt(number)
    for begin in range(0, number, _BLOCK):
        block = torch.empty(min(_BLOCK, number - begin), like.numel(), device=like.device)
        yield block.uniform_(-bound, bound, generator=generator).to(like.dtype)
