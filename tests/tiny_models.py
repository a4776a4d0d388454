"""Tiny random models of the eleven families, each built so that what sets the family apart changes its output."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from rankernel.layout import BlockLayout

VOCABULARY = 97
WINDOW = 9
_SLIDING = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 32768,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1,
}  # fmt: skip
_LAYER_TYPES: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": _SLIDING}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, **_LAYER_TYPES}),
    "qwen3": ("Qwen3", {"use_sliding_window": True, **_LAYER_TYPES}),
    "gemma2": ("Gemma2", {"attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 24, **_LAYER_TYPES}),
    # Gemma 3 has the soft cap in its configuration but does not use it; it must not appear in the scores.
    "gemma3": ("Gemma3", {"attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 24, **_LAYER_TYPES}),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, **_LAYER_TYPES}),
    "cohere2": ("Cohere2", dict(_LAYER_TYPES)),
    "granite": ("Granite", {"attention_multiplier": 0.4}),
    "olmo3": ("Olmo3", dict(_LAYER_TYPES)),
}
"""Family to class prefix and what its configuration adds to the common one."""


def make_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A float32 causal language model of four layers in evaluation mode, on its family's default attention."""
    prefix, options = FAMILIES[family]
    config_class = getattr(transformers, f"{prefix}TextConfig" if family == "gemma3" else f"{prefix}Config")
    config = config_class(**{**_COMMON, **options, **overrides})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norm weights, biases and sinks, which start out constant
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (2.0 if name.endswith("sinks") else 0.3) * noise
    return model


def dense_mask(model: Any, layout: BlockLayout) -> Any:
    """What stock eager attention needs as ``attention_mask`` to compute what the layout says: O(T^2) and additive."""

    def additive(window: int | None) -> torch.Tensor:
        mask = layout.dense_mask(window)
        return torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None]

    window = getattr(model.config, "sliding_window", None)
    if getattr(model.config, "layer_types", None):
        return {"full_attention": additive(None), "sliding_attention": additive(window)}
    return additive(window)


def dense_inputs(model: Any, input_ids: torch.Tensor, layout: BlockLayout) -> dict[str, Any]:
    """The stock counterpart of ``rankernel.model_inputs``."""
    return {
        "input_ids": input_ids[None],
        "position_ids": layout.position_ids()[None],
        "attention_mask": dense_mask(model, layout),
        "use_cache": False,
    }


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
