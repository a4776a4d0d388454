"""Variants of low-rank adapters, each a page over :func:`rankernel.lora_linear`.

Two need nothing of their own: rsLoRA (arXiv 2312.03732) is LoRA with ``scaling = alpha / sqrt(rank)``, and QLoRA is
LoRA whose weight is ``quantize(weight).dequantize``.
"""

from rankernel.adapters.dora import DoRALinear, dora_linear, dora_norm, row_norm
from rankernel.adapters.dylora import DyLoRALinear
from rankernel.adapters.lora import LoRALinear
from rankernel.adapters.nola import NOLALinear
from rankernel.adapters.quantized import QuantizedWeight, quantize
from rankernel.adapters.sltrain import SLTrainLinear
from rankernel.adapters.smora import SMoRALinear
from rankernel.adapters.svdquant import SVDQuantLinear

__all__ = [
    "DoRALinear",
    "DyLoRALinear",
    "LoRALinear",
    "NOLALinear",
    "QuantizedWeight",
    "SLTrainLinear",
    "SMoRALinear",
    "SVDQuantLinear",
    "dora_linear",
    "dora_norm",
    "quantize",
    "row_norm",
]
