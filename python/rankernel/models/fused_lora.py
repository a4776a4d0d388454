"""PEFT's LoRA linear layer with rankernel's kernels in its forward; see :func:`rankernel.fuse_lora`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from rankernel.adapters import dora_linear
from rankernel.ops import multi_lora_linear, segment_lora_linear
from rankernel.ops._checks import NATIVE_DTYPES

BASE = "__base__"
"""PEFT's name for no adapter."""


class MixedBatch(NamedTuple):
    """Which adapter each row of a batch, or each list of a packed row, uses.

    Attributes:
        names: the adapters.
        adapters: [S] int64, index into names of each row or list, -1 for none.
        offsets: [S + 1] int64, where each row or list begins, counted in rows of the batch or in packed tokens.
        num_tokens: of the packed row; None where the segments are rows of the batch.
    """

    names: tuple[str, ...]
    adapters: torch.Tensor
    offsets: torch.Tensor
    num_tokens: int | None


@functools.lru_cache(maxsize=16)  # PEFT hands every layer the same names
def mixed_batch(adapter_names: tuple[str, ...], device: torch.device) -> MixedBatch:
    """Row i of the batch uses ``adapter_names[i]``."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(n for n in adapter_names if n != BASE))}
    with torch.inference_mode(False):  # autograd may save the remembered tensors later
        adapters = torch.tensor([numbers.get(name, -1) for name in adapter_names], dtype=torch.int64, device=device)
        offsets = torch.arange(len(adapter_names) + 1, device=device)
    return MixedBatch(tuple(numbers), adapters, offsets, None)


class _Adapter(NamedTuple):
    """The modules of one adapter, looked up once in a call."""

    name: str
    lora_A: nn.Linear
    lora_B: nn.Linear
    dropout: nn.Module
    scaling: float
    variant: object | None

    @property
    def dropout_p(self) -> float:
        dropout = self.dropout
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


class FusedLoraLinear(lora.Linear):
    """What :func:`rankernel.fuse_lora` makes of ``peft.tuners.lora.Linear``: the same parameters, another forward.

    Whatever the kernels do not do runs PEFT's forward.
    """

    rankernel_batch: MixedBatch | None = None
    """Set inside :func:`rankernel.mixed_adapters`."""

    def forward(self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if self.rankernel_batch is not None and not self.disable_adapters:
            return self._in_context(x, self.rankernel_batch, bool(args or kwargs or adapter_names))
        if not (args or kwargs or self.disable_adapters or self.merged_adapters):
            if adapter_names is not None:
                self._check_forward_args(x, adapter_names=adapter_names)
                batch = mixed_batch(tuple(adapter_names), x.device)
                adapters = self._here(batch.names)
                if self._why_not(adapters, mixed=True) is None:
                    return self._mixed(x, batch, adapters)
            else:
                adapters = self._here(self.active_adapters)
                if adapters and self._why_not(adapters, mixed=False) is None:
                    return self._summed(x, adapters)
        return super().forward(x, *args, adapter_names=adapter_names, **kwargs)

    def why_not(self, names: Sequence[str] | None = None) -> str | None:
        """What about the layer as it stands leaves a call to PEFT, or None.

        Args:
            names: adapters of a mixed batch; None: the active adapters, summed.
        """
        adapters = self._here(self.active_adapters if names is None else names)
        return self._why_not(adapters, mixed=names is not None)

    def _here(self, names: Sequence[str]) -> list[_Adapter]:
        """Those of the adapters that this layer has."""
        lora_A, lora_B, dropouts = self.lora_A, self.lora_B, self.lora_dropout
        return [
            _Adapter(n, lora_A[n], lora_B[n], dropouts[n], self.scaling[n], self.lora_variant.get(n))
            for n in names
            if n in lora_A
        ]

    def _why_not(self, adapters: Sequence[_Adapter], *, mixed: bool) -> str | None:
        base = self.base_layer
        if reason := _why_not_plain(base):
            return f"base_layer {reason}"
        dtype, device = base.weight.dtype, base.weight.device.type
        if dtype not in NATIVE_DTYPES or device not in ("cpu", "cuda"):
            return f"base_layer is {dtype} on {device}"
        if not self.cast_input_dtype_enabled:
            return "the cast of the input is disabled"
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        for adapter in adapters:
            reason = _why_not_adapter(adapter, dtype)
            if reason is None and len(adapters) > 1:
                reason = _why_not_beside(adapter, adapters[0])
            if reason is None and mixed and (adapter.variant is not None or self.lora_bias[adapter.name]):
                reason = "DoRA or a bias in a mixed batch"
            if reason:
                return f"adapter {adapter.name!r}: {reason}"
        return None

    def _summed(self, x: torch.Tensor, adapters: Sequence[_Adapter]) -> torch.Tensor:
        base, first = self.base_layer, adapters[0]
        if first.variant is not None:
            magnitude = self.lora_magnitude_vector[first.name].weight
            weights = base.weight, first.lora_A.weight, first.lora_B.weight
            return dora_linear(x, *weights, first.scaling, magnitude, bias=base.bias)
        out = multi_lora_linear(
            x,
            [base.weight],
            [adapter.lora_A.weight for adapter in adapters],
            [adapter.lora_B.weight for adapter in adapters],
            [adapter.scaling for adapter in adapters],
            biases=[base.bias],
            projections=[0] * len(adapters),
            dropout_p=first.dropout_p,
        )[0]
        biases = [adapter.scaling * adapter.lora_B.bias for adapter in adapters if adapter.lora_B.bias is not None]
        # Behind the product, not within base_layer's bias: a float32 bias has a float32 gradient.
        return (out + sum(biases)).to(out.dtype) if biases else out

    def _mixed(self, x: torch.Tensor, batch: MixedBatch, here: Sequence[_Adapter]) -> torch.Tensor:
        base = self.base_layer
        if not here:
            return base(x)
        first = here[0].lora_A.weight
        # An adapter that the layer lacks has rank 0 here.
        lacking = (first.new_empty(0, self.in_features), first.new_empty(self.out_features, 0), 0.0)
        factors = {adapter.name: (adapter.lora_A.weight, adapter.lora_B.weight, adapter.scaling) for adapter in here}
        adapters = [factors.get(name, lacking) for name in batch.names]
        offsets = batch.offsets if batch.num_tokens is not None else batch.offsets * math.prod(x.shape[1:-1])
        rows = x.reshape(-1, x.shape[-1])
        out = segment_lora_linear(
            rows, base.weight, adapters, offsets, batch.adapters, bias=base.bias, dropout_p=here[0].dropout_p
        )
        return out.view(*x.shape[:-1], self.out_features)

    def _in_context(self, x: torch.Tensor, batch: MixedBatch, has_arguments: bool) -> torch.Tensor:
        """A mixed batch that PEFT could not do in training, so that nothing is left to it."""
        if has_arguments:
            raise ValueError("mixed_adapters: expected no adapter_names or other arguments of PEFT inside")
        adapters = self._here(batch.names)
        if reason := "merged adapters" if self.merged_adapters else self._why_not(adapters, mixed=True):
            raise ValueError(f"mixed_adapters: expected LoRA layers that can be fused, got {reason}")
        expected, got = len(batch.adapters), x.shape[0]
        if batch.num_tokens is not None:
            expected, got = batch.num_tokens, math.prod(x.shape[:-1])
        if got != expected:
            what = "rows of the batch" if batch.num_tokens is None else "tokens, as the layout has,"
            raise ValueError(f"mixed_adapters: expected {expected} {what} in every LoRA layer, got {got}")
        return self._mixed(x, batch, adapters)


def _why_not_adapter(adapter: _Adapter, dtype: torch.dtype) -> str | None:
    """Why this adapter is not fused over a layer that computes in a dtype."""
    for linear in (adapter.lora_A, adapter.lora_B):
        if reason := _why_not_plain(linear):
            return f"lora_A or lora_B {reason}"
        if linear.weight.dtype not in (dtype, torch.float32):
            return f"{linear.weight.dtype} over {dtype}"
    if adapter.lora_A.weight.dtype != adapter.lora_B.weight.dtype:
        return "lora_A and lora_B of different dtypes"
    if type(adapter.dropout) not in (nn.Identity, nn.Dropout) or _is_watched(adapter.dropout):
        return f"lora_dropout is a {type(adapter.dropout).__name__} or has hooks"
    if adapter.dropout_p >= 1:
        return "lora_dropout drops everything"
    if adapter.variant is not None:
        if type(adapter.variant) is not DoraLinearVariant:
            return type(adapter.variant).__name__
        if adapter.dropout_p:
            return "DoRA with dropout"
    return None


def _why_not_beside(adapter: _Adapter, first: _Adapter) -> str | None:
    if adapter.lora_A.weight.dtype != first.lora_A.weight.dtype:
        return f"another dtype than {first.name!r}"
    if adapter.dropout_p != first.dropout_p:
        return f"another dropout than {first.name!r}"
    return None if adapter.variant is None else "DoRA beside other adapters"


def _is_watched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _why_not_plain(linear: nn.Module) -> str | None:
    """What calling the module may do beside the product with its weight."""
    if type(linear) is not nn.Linear:
        return f"is a {type(linear).__name__}"
    if _is_watched(linear):
        return "has hooks"
    if "forward" in linear.__dict__:
        return "has its forward replaced"
    weight = linear.weight
    if type(weight) not in (nn.Parameter, torch.Tensor):
        return f"has a {type(weight).__name__} as weight"
    return None
