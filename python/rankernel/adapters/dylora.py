"""DyLoRA (Valipour et al., arXiv 2210.07558): one adapter trained for every rank up to its own."""

from __future__ import annotations

import torch

from rankernel.adapters.lora import LoRALinear
from rankernel.ops import multi_lora_linear


class DyLoRALinear(LoRALinear):
    """A layer whose first b ranks are an adapter of their own, for every b up to ``max_rank``.

    In training every call draws b uniformly from 1 to ``max_rank`` and uses ``lora_A[:b]`` and ``lora_B[:, :b]``, which
    are read in place; the other ranks get gradient 0. Elsewhere ``rank`` of them are used. The scale is the same at
    every b, alpha / max_rank in the paper.

    Args:
        base: see :class:`LoRALinear`, also for scaling and dtype.
        max_rank: the largest rank.
        scaling: multiplies the update.
        frozen: only rank b learns, the ones before it are held fixed (the paper's frozen mode).
        generator: of b, on the CPU; None: PyTorch's default one, which gradient checkpointing restores.
        dtype: of the adapter.

    Attributes:
        rank: b outside training, 1 to ``max_rank``; it may be set at any time.
    """

    def __init__(
        self,
        base: torch.nn.Linear,
        max_rank: int,
        scaling: float,
        *,
        frozen: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(base, max_rank, scaling, dtype=dtype)
        self.rank = self.max_rank = max_rank
        self.frozen = frozen
        self.generator = generator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O]."""
        b = self.rank
        if self.training:
            b = int(torch.randint(1, self.max_rank + 1, (), generator=self.generator, device="cpu"))
        if not 1 <= b <= self.max_rank:
            raise ValueError(f"rank: expected 1 to {self.max_rank}, got {b}")
        first = b - 1 if self.training and self.frozen else 0
        held = (self.lora_A[:first].detach(), self.lora_B[:, :first].detach())
        learning = (self.lora_A[first:b], self.lora_B[:, first:b])
        lora_A, lora_B = zip(held, learning, strict=True)
        [y] = multi_lora_linear(
            x, [self.base.weight], lora_A, lora_B, [self.scaling] * 2, biases=[self.base.bias], projections=[0, 0]
        )
        return y

    def extra_repr(self) -> str:
        """The ranks and the scale."""
        return f"rank={self.rank}, max_rank={self.max_rank}, scaling={self.scaling}, frozen={self.frozen}"
