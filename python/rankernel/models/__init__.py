"""Hugging Face models: attach rankernel's attention, stop early, score candidates, pack prompts, fuse LoRA.

Importing this imports neither transformers nor peft.
"""

from rankernel.models.attach import AttachReport, attach, attached, detach
from rankernel.models.attention import MassRequest, ScoreRequest, model_inputs
from rankernel.models.early_exit import early_exit, layer_scores
from rankernel.models.graphs import LayerScoreGraphs
from rankernel.models.heads import Head, final_hidden_states, head_of
from rankernel.models.lora import FuseReport, fuse_lora, mixed_adapters, unfuse_lora
from rankernel.models.packing import PackedPrompts, pack_prompts

__all__ = [
    "AttachReport",
    "FuseReport",
    "Head",
    "LayerScoreGraphs",
    "MassRequest",
    "PackedPrompts",
    "ScoreRequest",
    "attach",
    "attached",
    "detach",
    "early_exit",
    "final_hidden_states",
    "fuse_lora",
    "head_of",
    "layer_scores",
    "mixed_adapters",
    "model_inputs",
    "pack_prompts",
    "unfuse_lora",
]
