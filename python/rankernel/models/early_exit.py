"""Stops a decoder after the layer whose attention scores the documents."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch

from rankernel.layout import BlockLayout
from rankernel.models.attach import decoder_of, from_model_file, is_attached
from rankernel.models.attention import ScoreRequest, model_inputs, tokens_first
from rankernel.ops import document_logsumexp

_FAMILIES = {
    "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi3", "GptOss", "Cohere2", "Granite", "Olmo3",
}  # fmt: skip


@contextlib.contextmanager
def early_exit(model: torch.nn.Module, layer: int) -> Iterator[None]:
    """Inside, the model runs layers 0 to ``layer`` inclusive and goes on with its final norm and head.

    The decoder's list of layers is replaced, which works for every family, and put back in any case. Neither save the
    model nor use it from another thread inside. Under FSDP2 call the root module, with ``logits_to_keep=1``.

    Raises:
        ValueError: a layer that the model does not have.
    """
    decoder = decoder_of(model)
    _check_layer(decoder, layer)
    with _layers(decoder, list(decoder.layers)[: layer + 1]):
        yield


def layer_scores(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    layout: BlockLayout,
    layer: int,
    rows: torch.Tensor,
    *,
    position_ids: torch.Tensor | None = None,
    position_scheme: Literal["shared", "sequential"] = "shared",
    tail_offset: int = 16384,
) -> torch.Tensor:
    """Document scores of one layer at the least cost: nothing behind that layer's logits is computed.

    Layers below ``layer`` run in full. Of ``layer`` itself only the keys of all tokens and the queries of ``rows``
    are projected, through the layer's own modules, so that LoRA adapters count. Where the family is not known exactly
    the layer runs in full. The language-model head never runs. Differentiable where gradients are enabled. The
    decoder's list of layers is replaced meanwhile, so one model serves one thread. Not for FSDP, which gathers weights
    only for whole layers: use :func:`early_exit` and a :class:`ScoreRequest` there.

    Args:
        model: an attached model.
        input_ids: [T] or [1, T], the packed tokens.
        layout: where the lists lie.
        layer: index of the scoring layer.
        rows: [R] integers, packed positions of the query rows.
        position_ids: as in :func:`rankernel.model_inputs`.
        position_scheme: likewise.
        tail_offset: likewise.

    Returns:
        float32 [R, Hq, max_documents], :func:`rankernel.document_logsumexp` of that layer, without a sliding window.

    Raises:
        ValueError: a model that is not attached, a layer that it does not have, or inputs that do not fit.
    """
    decoder = decoder_of(model)
    _check_layer(decoder, layer)
    if not is_attached(model):
        raise ValueError("model: expected an attached model; call rankernel.attach(model) first")
    inputs = model_inputs(
        input_ids,
        layout,
        position_ids=position_ids,
        position_scheme=position_scheme,
        tail_offset=tail_offset,
        scores=ScoreRequest([layer], rows),
    )
    layers = list(decoder.layers)[: layer + 1]
    family = family_of(layers[-1])
    if family is None:
        with _layers(decoder, layers):
            return decoder(**inputs).attentions[0]
    request: ScoreRequest = inputs.pop("block_scores")
    del inputs["output_attentions"]
    layers[-1] = score_layer = _ScoreLayer(layers[-1], family, inputs["block_layout"], request.rows)
    with _layers(decoder, layers):
        decoder(**inputs)
    return score_layer.scores


class _ScoreLayer(torch.nn.Module):
    """Stands in for a decoder layer: keeps the scores of its attention and passes the hidden states on unchanged."""

    scores: torch.Tensor

    def __init__(self, layer: torch.nn.Module, family: str, layout: BlockLayout, rows: torch.Tensor) -> None:
        super().__init__()
        self.layer: Any = layer
        self.family = family
        self.layout = layout
        self.rows = rows

    def forward(
        self, hidden_states: torch.Tensor, *, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> torch.Tensor:
        attention = self.layer.self_attn
        rows, layout = self.rows.to(hidden_states.device), self.layout.to(hidden_states.device)
        # OLMo 3 normalizes behind its attention instead of before it.
        normed = hidden_states if self.family == "Olmo3" else self.layer.input_layernorm(hidden_states)
        query, key = _project(self.family, attention, normed, rows)
        # Cohere 2 has no positions on its full-attention layers.
        if self.family != "Cohere2" or attention.sliding_window is not None:
            rotate = from_model_file(attention, "apply_rotary_pos_emb")
            cos, sin = position_embeddings
            query, _ = rotate(query, query[:, :0], cos[:, rows], sin[:, rows])
            _, key = rotate(key[:, :0], key, cos, sin)
        softcap = attention.attn_logit_softcapping if self.family == "Gemma2" else None
        self.scores = document_logsumexp(
            tokens_first(query), tokens_first(key), layout, rows, scale=attention.scaling, softcap=softcap
        )
        return hidden_states


def _project(
    family: str, attention: Any, hidden: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query [1, Hq, R, D] of the rows and key [1, Hkv, T, D] of all tokens, before RoPE, from hidden [1, T, E]."""
    if family == "Phi3":
        query, key = _project_fused(attention, hidden, rows)
    else:
        query, key = attention.q_proj(hidden[:, rows]), attention.k_proj(hidden)
    if family == "Olmo3":
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = (tensor.unflatten(-1, (-1, attention.head_dim)) for tensor in (query, key))
    if family in ("Qwen3", "Gemma3"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    return query.transpose(1, 2), key.transpose(1, 2)


def _project_fused(attention: Any, hidden: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for Phi-3's one projection for query, key and value, whose rows are sliced where nothing wraps it."""
    project = attention.qkv_proj
    end_of_query = attention.config.num_attention_heads * attention.head_dim
    end_of_key = end_of_query + attention.num_key_value_heads * attention.head_dim
    if type(project) is torch.nn.Linear and "forward" not in vars(project):
        query = torch.nn.functional.linear(hidden[:, rows], project.weight[:end_of_query])
        return query, torch.nn.functional.linear(hidden, project.weight[end_of_query:end_of_key])
    fused = project(hidden)
    return fused[:, rows, :end_of_query], fused[..., end_of_query:end_of_key]


def family_of(layer: Any) -> str | None:
    """Name of the family whose attention this layer has exactly, or None.

    A class derived by FSDP counts; one that overrides ``forward``, or a module whose ``forward`` is wrapped as
    accelerate does, does not.
    """
    if "forward" in vars(layer) or "forward" in vars(layer.self_attn):
        return None
    attention: Any = type(layer.self_attn)
    for cls in attention.__mro__:
        family = cls.__name__.removesuffix("Attention")
        if family in _FAMILIES and cls.__module__.startswith("transformers.models."):
            return family if attention.forward is cls.forward else None
    return None


@contextlib.contextmanager
def _layers(decoder: Any, layers: list[torch.nn.Module]) -> Iterator[None]:
    all_layers = decoder.layers
    decoder.layers = torch.nn.ModuleList(layers)
    # Transformers hooks all modules once, the first time that it collects attentions: it shall find these too.
    decoder.skipped_layers = all_layers[len(layers) :]
    try:
        yield
    finally:
        decoder.layers = all_layers
        del decoder.skipped_layers


def _check_layer(decoder: Any, layer: int) -> None:
    if not 0 <= layer < len(decoder.layers):
        raise ValueError(f"layer: expected an index in [0, {len(decoder.layers)}), got {layer}")
