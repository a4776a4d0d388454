"""SMoRA (arXiv 2501.15103): a mixture of experts whose experts are the ranks of one adapter."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from rankernel.adapters.lora import LoRALinear
from rankernel.ops import lora_linear

_BIAS_RATE = 1e-5


class SMoRALinear(LoRALinear):
    """A layer that uses, in every row, the ranks that a router chooses.

    With ``z = sigmoid(x R^T + c)`` the largest z of a row are kept, divided by their sum and multiplied by
    ``active_rank``; they gate the ranks, the others are off: ``y = x W^T + b + s (gate * (x A^T)) B^T``. The router R
    learns through the gates. The balance c learns without a loss: every call in training adds 1e-5 to experts that
    fewer rows than the average chose, and takes it from the others.

    The gates are dense: with ranks this few, gathering the chosen ones would cost more than multiplying by 0.

    Args:
        base: see :class:`LoRALinear`, also for dtype.
        rank: of the adapter.
        active_rank: how many ranks a row uses.
        scaling: multiplies the update; alpha / active_rank in the paper.
        expert_rank: consecutive ranks that share a gate; divides both ranks.
        dtype: of the adapter and the router.

    Attributes:
        balance: c, float32; steps of 1e-5 would be lost in a shorter dtype.
    """

    balance: torch.Tensor

    def __init__(
        self,
        base: torch.nn.Linear,
        rank: int,
        active_rank: int,
        scaling: float,
        *,
        expert_rank: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(base, rank, scaling, dtype=dtype)
        if not 1 <= active_rank <= rank:
            raise ValueError(f"active_rank: expected 1 to {rank}, got {active_rank}")
        if expert_rank < 1 or rank % expert_rank or active_rank % expert_rank:
            raise ValueError(f"expert_rank: expected a divisor of {rank} and {active_rank}, got {expert_rank}")
        self.active_rank = active_rank
        self.expert_rank = expert_rank
        self.router = torch.nn.Parameter(torch.empty_like(self.lora_A[::expert_rank]))
        torch.nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))
        self.register_buffer("balance", torch.zeros(len(self.router), device=self.router.device))

    def gates(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., rank], float32: the gates of the chosen ranks, which sum to ``active_rank``, and 0."""
        logits = F.linear(x, self.router.to(x.dtype))
        z = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)) + self.balance)
        best, chosen = z.topk(self.active_rank // self.expert_rank, dim=-1)
        gates = best * (best.shape[-1] / best.sum(dim=-1, keepdim=True))
        if self.training:
            counts = chosen.flatten().bincount(minlength=len(self.balance)).float()
            self.balance += _BIAS_RATE * (counts.mean() - counts).sign()
        return torch.zeros_like(z).scatter(-1, chosen, gates).repeat_interleave(self.expert_rank, dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O]."""
        weight, bias = self.base.weight, self.base.bias
        return lora_linear(x, weight, self.lora_A, self.lora_B, self.scaling, bias=bias, gate=self.gates(x))

    def extra_repr(self) -> str:
        """The ranks and the scale."""
        return f"{super().extra_repr()}, active_rank={self.active_rank}, expert_rank={self.expert_rank}"
