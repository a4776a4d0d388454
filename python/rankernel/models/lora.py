"""Runs PEFT's LoRA layers on rankernel's kernels, and back without a trace."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from rankernel.layout import BlockLayout


class LoraLayerReport(NamedTuple):
    """One LoRA layer of PEFT.

    Attributes:
        name: as in ``model.named_modules()``.
        fused: whether it runs rankernel's kernels as the model stands: its active adapters, training or not.
        why_not: what leaves it to PEFT; None where it is fused.
    """

    name: str
    fused: bool
    why_not: str | None


class FuseReport(list[LoraLayerReport]):
    """What :func:`fuse_lora` found, layer by layer; print it."""

    def __str__(self) -> str:
        lines = [f"{sum(layer.fused for layer in self)} of {len(self)} LoRA layers run rankernel"]
        for reason in dict.fromkeys(layer.why_not for layer in self if layer.why_not):
            names = [layer.name for layer in self if layer.why_not == reason]
            lines.append(f"  PEFT runs {len(names)}, {reason}: {names[0]}{', ...' if len(names) > 1 else ''}")
        return "\n".join(lines)


def fuse_lora(model: torch.nn.Module) -> FuseReport:
    """Makes the LoRA layers of a PEFT model compute :func:`rankernel.lora_linear`.

    Swaps the class of every ``peft.tuners.lora.Linear`` over a plain ``torch.nn.Linear``. Parameters, names, saved
    adapters, merging, hooks, and adapters added or deleted later stay PEFT's; :func:`unfuse_lora` undoes it. Fused are
    one or several active adapters, rsLoRA, dropout, biases of adapters, DoRA without dropout, and mixed batches by
    ``adapter_names``, in float32, bfloat16 and float16, with adapters of the base layer's dtype or float32. PEFT runs
    everything else, call by call: other variants, quantised or parametrised weights, hooks inside the layer.

    Other than in PEFT, several active adapters share one dropout mask; under autocast float32 adapters stay float32;
    DoRA rounds the base product before and after its gain; and gradients are differentiable once.

    Args:
        model: with LoRA adapters of PEFT, in any wrapper. A second call changes nothing and reports anew.

    Returns:
        All LoRA layers, and what leaves a layer to PEFT.

    Raises:
        ImportError: peft is not installed.
        ValueError: there is no LoRA layer.
    """
    lora, fused_lora = _peft()
    report = FuseReport()
    for name, module in model.named_modules():
        if not isinstance(module, lora.LoraLayer):
            continue
        reason = _why_no_swap(module, lora)
        if reason is None:
            module.__class__ = fused_lora.FusedLoraLinear
        if type(module) is fused_lora.FusedLoraLinear:
            reason = module.why_not()
        report.append(LoraLayerReport(name, reason is None, reason))
    if not report:
        raise ValueError(f"model: expected LoRA layers of PEFT, {type(model).__name__} has none")
    return report


def unfuse_lora(model: torch.nn.Module) -> None:
    """Gives the layers that :func:`fuse_lora` swapped PEFT's class back."""
    fused_lora = sys.modules.get("rankernel.models.fused_lora")
    if fused_lora is None:
        return
    for module in model.modules():
        if type(module) is fused_lora.FusedLoraLinear:
            module.__class__ = fused_lora.lora.Linear


@contextlib.contextmanager
def mixed_adapters(
    model: torch.nn.Module, adapter_names: Sequence[str], layout: BlockLayout | None = None
) -> Iterator[None]:
    """Inside, every row of a batch, or every list of a packed row, uses an adapter of its own, in training too.

    The active adapters then do not matter, but PEFT lets only theirs be trained: activate those of the batch with
    ``model.base_model.set_adapter([...])``. Gradient checkpointing runs layers again in the backward pass, which so
    belongs inside too. Adapters that no row uses get no gradient: DistributedDataParallel needs
    ``find_unused_parameters`` where batches differ in their adapters. ``model.disable_adapter()`` works inside.

    Args:
        model: after :func:`fuse_lora`, with nothing merged.
        adapter_names: of row i of the batch, or of list i of the layout; ``"__base__"`` for none.
        layout: of the packed row that the model is called with.

    Raises:
        ValueError: an adapter that the model lacks, a wrong number of them, or a layer of PEFT that would not follow;
            inside, a batch of another size. Nothing is left to PEFT.
    """
    _, fused_lora = _peft()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(adapter_names, str):
        raise ValueError(f"adapter_names: expected one name for each row or list, got {adapter_names!r}")
    if layout is not None and len(adapter_names) != layout.num_lists:
        raise ValueError(f"adapter_names: expected {layout.num_lists}, one for each list, got {len(adapter_names)}")
    tuned: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    for name, module in tuned.items():
        if type(module) is not fused_lora.FusedLoraLinear:
            raise ValueError(f"model: expected fused LoRA layers alone, got {type(module).__name__} at {name}")
        reason = "merged adapters" if module.merged else module.why_not(list(dict.fromkeys(adapter_names)))
        if reason:
            raise ValueError(f"model: expected LoRA layers that can be fused, got {reason} at {name}")
    known = {fused_lora.BASE}.union(*(module.lora_A for module in tuned.values()))
    if unknown := sorted(set(adapter_names) - known):
        raise ValueError(f"adapter_names: expected some of {sorted(known)}, got {unknown}")
    devices = {module.base_layer.weight.device for module in tuned.values()}
    batches = {device: fused_lora.mixed_batch(tuple(adapter_names), device) for device in devices}
    if layout is not None:
        for device, batch in batches.items():
            there = layout.to(device)
            offsets = there.cu_seqlens[there.list_offsets].to(torch.int64)
            batches[device] = batch._replace(offsets=offsets, num_tokens=layout.num_tokens)
    before = {module: module.rankernel_batch for module in tuned.values()}
    try:
        for module in tuned.values():
            module.rankernel_batch = batches[module.base_layer.weight.device]
        yield
    finally:
        for module, batch in before.items():
            module.rankernel_batch = batch


def _peft() -> tuple[Any, Any]:
    """PEFT's LoRA and the layer derived from it, imported only where they are used."""
    try:
        from peft.tuners import lora
    except ImportError as error:
        raise ImportError('LoRA layers need peft: pip install "rankernel[peft]"') from error
    from rankernel.models import fused_lora

    return lora, fused_lora


def _why_no_swap(module: Any, lora: Any) -> str | None:
    if type(module) is not lora.Linear:
        return f"a {type(module).__name__} is not lora.Linear"
    if type(module.base_layer) is not torch.nn.Linear:
        return f"base_layer is a {type(module.base_layer).__name__}"
    if module.fan_in_fan_out:
        return "fan_in_fan_out"
    if "forward" in vars(module):
        return "forward is replaced"
    return None
