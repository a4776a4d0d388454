"""Low-rank adapters beside a linear layer: the layer as autograd differentiates it, and what its two kernels do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    *,
    bias: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """``x W^T + b + s (gate * (drop(x) A^T)) B^T`` (METHODS.md section 9); see :func:`rankernel.lora_linear`."""
    dropped = x if dropout is None else x * keep_mask(x[..., 0].numel(), x.shape[-1], dropout).to(x.dtype).view_as(x)
    sums = dropped @ lora_A.T
    return F.linear(x, weight, bias) + scaling * ((sums if gate is None else sums * gate) @ lora_B.T)


def segment_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[tuple[torch.Tensor, torch.Tensor, float]],
    segment_offsets: torch.Tensor,
    segment_adapters: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`lora_linear` segment by segment; see :func:`rankernel.segment_lora_linear`."""
    parts = []
    for begin, end, adapter in zip(segment_offsets[:-1], segment_offsets[1:], segment_adapters, strict=True):
        rows = x[begin:end]
        if adapter < 0:
            parts.append(F.linear(rows, weight, bias))
            continue
        lora_A, lora_B, scaling = adapters[adapter]
        own = None if gate is None else (gate if gate.dim() == 1 else gate[begin:end])[..., : len(lora_A)]
        parts.append(lora_linear(rows, weight, lora_A, lora_B, scaling, bias=bias, gate=own))
    return torch.cat(parts) if parts else x.new_zeros(0, len(weight))


class Segments(NamedTuple):
    """Which factor each row uses.

    Attributes:
        offsets: [S + 1] int64, from 0 to the number of rows: segment i is rows [offsets[i], offsets[i + 1]).
        adapters: [S] int64, the segment's factor, -1 for none.
    """

    offsets: torch.Tensor
    adapters: torch.Tensor


class Dropout(NamedTuple):
    """Attributes: probability in [0, 1), and seed, one int64 on the device of x."""

    probability: float
    seed: torch.Tensor


def drop_threshold(probability: float) -> int:
    """Elements whose 16 random bits lie below it are dropped; the others are multiplied by 65536 / (65536 - it)."""
    return min(round(probability * 65536), 65535)


def _product(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a b, for 0 <= a, b < 2^32, in halves so that int64 does not overflow."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    low = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (low >> 32), low & 0xFFFFFFFF


def keep_mask(num_rows: int, size: int, dropout: Dropout) -> torch.Tensor:
    """What dropout multiplies with, float64 [num_rows, size]: 0, or 65536 / (65536 - threshold).

    Philox4x32-10 (Salmon et al., SC 2011) with the seed as key and (16 (column / 128) + column % 16, row, row >> 32, 0)
    as counter gives four words; of a block of 128 columns, columns 32 w to 32 w + 15 take the low halves of the words
    w of their 16 counters, the next 16 the high halves. A row of 16 lanes so needs no shuffle.
    """
    device = dropout.seed.device
    column = torch.arange(size, device=device)
    row = torch.arange(num_rows, device=device)[:, None]
    c0 = (16 * (column // 128) + column % 16).expand(num_rows, size)
    c1, c2, c3 = ((row & 0xFFFFFFFF).expand_as(c0), (row >> 32).expand_as(c0), torch.zeros_like(c0))
    seed = dropout.seed.to(torch.int64)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        high0, low0 = _product(c0, 0xD2511F53)
        high1, low1 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    word = torch.stack((c0, c1, c2, c3)).gather(0, ((column % 128) // 32).expand(1, num_rows, size))[0]
    bits = (word >> (16 * (column // 16 % 2))) & 0xFFFF
    threshold = drop_threshold(dropout.probability)
    return (bits >= threshold) * (65536 / (65536 - threshold))


def _rows_of(factors: Sequence[torch.Tensor], segments: Segments | None, rows: torch.Tensor) -> list[torch.Tensor]:
    """The positions of every factor's rows."""
    if segments is None:
        return [torch.arange(len(rows), device=rows.device)] * len(factors)
    adapters = torch.repeat_interleave(segments.adapters, segments.offsets.diff())
    return [(adapters == number).nonzero()[:, 0] for number in range(len(factors))]


def lora_shrink(
    x: torch.Tensor,
    factors: Sequence[torch.Tensor],
    scales: Sequence[float],
    columns: Sequence[int],
    segments: Segments | None = None,
    dropout: Dropout | None = None,
    *,
    sums: torch.Tensor | None = None,
    coefficients: torch.Tensor | None = None,
    gradients: Sequence[torch.Tensor | None] = (),
) -> None:
    """``sums = x (scale F)^T`` for every factor's rows, and in the same pass ``gradients = scale coefficients^T x``.

    Args:
        x: [N, K], last dimension contiguous.
        factors: of [r, K] each, any strides; dtype of x, or float32.
        scales: of the factors.
        columns: where the ranks of each factor stand in sums and coefficients.
        segments: the one factor of each row; None: every factor applies to every row.
        dropout: of x.
        sums: [N, width], float32 (float64 for float64 x), last dimension contiguous; overwritten, with 0 where a row
            has no such rank.
        coefficients: [N, width] as sums, for gradients.
        gradients: one [r, K] of any strides for every factor, or None where not wanted; overwritten.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide) if dropout is None else x * keep_mask(len(x), x.shape[1], dropout).to(wide)
    if sums is not None:
        sums.zero_()
    for number, rows in enumerate(_rows_of(factors, segments, x)):
        factor, scale = factors[number], scales[number]
        own = slice(columns[number], columns[number] + len(factor))
        if sums is not None:
            sums[rows, own] = scale * (x[rows] @ factor.to(wide).T)
        gradient = gradients[number] if gradients else None
        if coefficients is not None and gradient is not None:
            gradient.copy_(scale * (coefficients[rows, own].T @ x[rows]))


def lora_expand(
    out: torch.Tensor,
    coefficients: torch.Tensor,
    factors: Sequence[torch.Tensor],
    scales: Sequence[float],
    columns: Sequence[int],
    segments: Segments | None = None,
    dropout: Dropout | None = None,
) -> None:
    """``out += coefficients (scale F)`` for every factor's rows, in place, rounded once.

    Args:
        out: [N, K], last dimension contiguous.
        coefficients: [N, width], float32 (float64 for float64 out), last dimension contiguous.
        factors: of [r, K] each, any strides; dtype of out, or float32.
        scales: of the factors.
        columns: where the ranks of each factor stand in coefficients.
        segments: the one factor of each row; None: every factor applies to every row.
        dropout: of the update.
    """
    update = torch.zeros_like(out, dtype=coefficients.dtype)
    for number, rows in enumerate(_rows_of(factors, segments, out)):
        factor = factors[number].to(update.dtype)
        own = slice(columns[number], columns[number] + len(factor))
        update[rows] += scales[number] * (coefficients[rows, own] @ factor)
    if dropout is not None:
        update *= keep_mask(len(out), out.shape[1], dropout).to(update.dtype)
    out.copy_(out + update)
