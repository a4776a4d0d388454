"""The linear layer with a low-rank adapter that the variants build on."""

from __future__ import annotations

import math

import torch

from rankernel.ops import lora_linear


class LoRALinear(torch.nn.Module):
    """A frozen linear layer with a trainable low-rank adapter: :func:`rankernel.lora_linear` as a module.

    LoRA (Hu et al., arXiv 2106.09685). ``lora_A`` starts as a linear layer's weight does, ``lora_B`` at 0.

    Args:
        base: the layer; its parameters are frozen and kept, not copied.
        rank: r; ``lora_A`` is [r, I], ``lora_B`` [O, r].
        scaling: multiplies the update: alpha / rank; alpha / sqrt(rank) in rsLoRA (arXiv 2312.03732).
        dtype: of the adapter: that of the base (None), or float32.
    """

    def __init__(self, base: torch.nn.Linear, rank: int, scaling: float, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank: expected at least 1, got {rank}")
        self.base = base.requires_grad_(False)
        self.scaling = scaling
        self.lora_A = torch.nn.Parameter(base.weight.new_empty(rank, base.in_features, dtype=dtype))
        self.lora_B = torch.nn.Parameter(base.weight.new_zeros(base.out_features, rank, dtype=dtype))
        torch.nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O]."""
        return lora_linear(x, self.base.weight, self.lora_A, self.lora_B, self.scaling, bias=self.base.bias)

    def extra_repr(self) -> str:
        """The rank and the scale."""
        return f"rank={len(self.lora_A)}, scaling={self.scaling}"
