"""A low-rank branch beside a quantised weight, in the manner of SVDQuant (Li et al., arXiv 2411.05007)."""

from __future__ import annotations

import math

import torch

from rankernel.adapters.quantized import quantize
from rankernel.ops import multi_lora_linear


class SVDQuantLinear(torch.nn.Module):
    """A frozen linear layer whose weight is a low-rank part and a quantised rest; x stays as it is.

    The largest singular values of ``W diag(smooth)`` stay in the dtype of the weight, and the rest, whose spread is
    smaller, is quantised. The paper divides x by smooth; here the two parts of the weight are, which is the same and
    leaves x to the adapter of :meth:`add_lora`.

    Args:
        weight: [O, I].
        bias: [O] or None.
        rank: of the part that is not quantised; 0 is allowed.
        bits: see :func:`quantize`, also for group_size.
        group_size: columns that share a scale.
        smooth: [I], positive; moves what quantisation should keep into columns that x uses much. None: ones.

    Attributes:
        lora_A, lora_B: the trainable adapter of :meth:`add_lora`, or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    smooth: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        rank: int = 32,
        bits: int = 4,
        group_size: int = 64,
        smooth: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= rank <= min(weight.shape):
            raise ValueError(f"rank: expected 0 to {min(weight.shape)}, got {rank}")
        columns = torch.ones_like(weight[0]) if smooth is None else smooth.detach()
        left, values, right = torch.linalg.svd(weight.detach().double() * columns.double(), full_matrices=False)
        up = (left[:, :rank] * values[:rank]).to(weight.dtype)
        down = (right[:rank] / columns.double()).to(weight.dtype)
        # The rest is that of the rounded factors, so that it takes their rounding too.
        rest = (weight.detach().double() - up.double() @ down.double()) * columns.double()
        self.quantized = quantize(rest.to(weight.dtype), bits, group_size)
        tensors = {"up": up, "down": down, "bias": bias, "smooth": smooth}
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach())
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.scaling = 0.0

    def add_lora(self, rank: int, scaling: float, *, dtype: torch.dtype | None = None) -> None:
        """Adds a trainable adapter, ``lora_A`` [r, I] and ``lora_B`` [O, r], in the weight's dtype or float32."""
        self.lora_A = torch.nn.Parameter(self.down.new_empty(rank, self.down.shape[1], dtype=dtype))
        self.lora_B = torch.nn.Parameter(self.up.new_zeros(len(self.up), rank, dtype=dtype))
        torch.nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = scaling

    def rest(self) -> torch.Tensor:
        """What the quantised part stands for, dense: [O, I]."""
        dense = self.quantized.dequantize()
        return dense if self.smooth is None else dense.div_(self.smooth)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O]."""
        adapters = [(self.down, self.up, 1.0)]
        if self.lora_A is not None:
            # The op takes adapters of one dtype; that of the branch is as short as the trainable one.
            own = self.lora_A.dtype
            adapters = [(self.down.to(own), self.up.to(own), 1.0), (self.lora_A, self.lora_B, self.scaling)]
        lora_A, lora_B, scalings = zip(*adapters, strict=True)
        [y] = multi_lora_linear(
            x, [self.rest], lora_A, lora_B, scalings, biases=[self.bias], projections=[0] * len(adapters)
        )
        return y
