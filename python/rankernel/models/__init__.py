"""Hugging Face models: attach rankernel's attention, stop early. Importing this does not import transformers."""

from rankernel.models.attach import AttachReport, attach, attached, detach
from rankernel.models.attention import ScoreRequest, model_inputs
from rankernel.models.early_exit import early_exit, layer_scores

__all__ = [
    "AttachReport",
    "ScoreRequest",
    "attach",
    "attached",
    "detach",
    "early_exit",
    "layer_scores",
    "model_inputs",
]
