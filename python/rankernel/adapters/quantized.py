"""A weight in 4 or 8 bits beside adapters."""

from __future__ import annotations

import torch


class QuantizedWeight(torch.nn.Module):
    """A weight in 4 or 8 bits, symmetric, one scale for every group of columns of a row.

    ``lora_linear(x, quantized.dequantize, lora_A, lora_B, scaling)`` is QLoRA (arXiv 2305.14314): the dense weight is
    made for the product of the forward pass, again for that of the backward pass, and not kept between.

    Attributes:
        codes: [O, I] int8; with 4 bits [O, I / 2] uint8, where a byte holds ``code + 8`` of two columns of a group, the
            low half that of the group's first half.
        scales: [O, I / group_size], dtype of the weight.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight [O, I] in a dtype; None: that of the scales."""
        codes = self.codes.unflatten(1, (self.scales.shape[1], -1))
        scales = self.scales if dtype is None else self.scales.to(dtype)
        if codes.dtype == torch.uint8:
            dense = torch.cat((codes & 15, codes >> 4), dim=2).to(scales.dtype).sub_(8)
        else:
            dense = codes.to(scales.dtype)
        return dense.mul_(scales[:, :, None]).flatten(1)


def quantize(weight: torch.Tensor, bits: int = 4, group_size: int = 64) -> QuantizedWeight:
    """Rounds every group to ``2^(bits - 1) - 1`` steps of its largest magnitude on either side of 0.

    Args:
        weight: [O, I], any floating dtype.
        bits: 4 or 8.
        group_size: columns that share a scale; even, divides I.

    Raises:
        ValueError: another number of bits, or a group size that does not fit.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 4 or 8, got {bits}")
    if group_size < 2 or group_size % 2 or weight.shape[1] % group_size:
        raise ValueError(f"group_size: expected an even divisor of {weight.shape[1]}, got {group_size}")
    largest = 2 ** (bits - 1) - 1
    wide = torch.promote_types(weight.dtype, torch.float32)
    groups = weight.detach().to(wide).unflatten(1, (-1, group_size))
    # Codes are those of the rounded scale. A group of zeros has scale 0 and codes 0.
    scales = (groups.abs().amax(dim=2) / largest).to(weight.dtype)
    steps = scales.to(wide).clamp(min=torch.finfo(wide).tiny)
    codes = (groups / steps[:, :, None]).round().clamp(-largest, largest)
    if bits == 8:
        return QuantizedWeight(codes.to(torch.int8).flatten(1), scales)
    low, high = (codes + 8).to(torch.uint8).chunk(2, dim=2)
    return QuantizedWeight((low | high << 4).flatten(1), scales)
