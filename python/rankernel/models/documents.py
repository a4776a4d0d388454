"""Keys and values of a prefix and its documents, computed once and read by several tails (HF.md section 4)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from rankernel.layout import BlockLayout
from rankernel.models.attach import attach, decoder_of, is_attached
from rankernel.models.attention import model_inputs
from rankernel.models.heads import final_hidden_states

_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class DocumentContext:
    """What tails read of a prefix and its documents; made by :func:`prefill`.

    Under the block pattern no document sees another, and all start at one position: without one of them the keys and
    values of the others are what they are with it, so documents can be removed. Tails do not see each other.

    Attributes:
        documents: indices of the documents that are still there, ascending.
        tail_offset: position of the first tail token.
        tail_room: most tokens that a tail may have.
    """

    def __init__(self, model: torch.nn.Module, cache: Any, layout: BlockLayout, tail_offset: int, room: int) -> None:
        self._model, self._cache = model, cache
        prefix, documents, _ = layout.lengths[0]
        self.documents = list(range(len(documents)))
        self.tail_offset, self.tail_room = tail_offset, room
        lengths = torch.tensor([prefix, *documents])
        self._owner = torch.repeat_interleave(torch.arange(-1, len(documents)), lengths)

    def remove(self, document: int) -> None:
        """Removes a document for all tails to come.

        Attention does not depend on the order of keys that all are visible, so the last tokens move into the gap: at
        most as many are copied as go.

        Raises:
            ValueError: there is no such document any more.
        """
        if document not in self.documents:
            raise ValueError(f"document: expected one of {self.documents}, got {document}")
        self.documents.remove(document)
        gone = self._owner == document
        end = len(gone) - int(gone.sum())
        gaps, movers = gone[:end].nonzero()[:, 0], end + (~gone[end:]).nonzero()[:, 0]
        self._owner[gaps] = self._owner[movers]
        self._owner = self._owner[:end]
        for layer in self._cache.layers:
            layer.move(movers, gaps)
            layer.keep(end)

    @torch.no_grad()
    def tail(self, input_ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Reads a tail behind the prefix and the documents that are still there, with the model's own attention.

        Args:
            input_ids: [t] integers, token ids of the tail, at the positions from ``tail_offset`` on.

        Returns:
            [1, E], hidden state of the last token behind the final norm, in the dtype of the model: that of the packed
            prompt ``[prefix][document]...[document][tail]`` of these documents, up to rounding.

        Raises:
            ValueError: an empty tail, or one of more than ``tail_room`` tokens.
        """
        device = decoder_of(self._model).device
        tokens = torch.as_tensor(input_ids, device=device)
        if tokens.dim() != 1 or not 1 <= len(tokens) <= self.tail_room:
            raise ValueError(f"input_ids: expected [t] with t from 1 to {self.tail_room}, got {list(tokens.shape)}")
        try:
            return final_hidden_states(
                self._model,
                torch.tensor([len(tokens) - 1]),
                input_ids=tokens[None],
                position_ids=torch.arange(self.tail_offset, self.tail_offset + len(tokens), device=device)[None],
                past_key_values=self._cache,
                use_cache=True,
            )
        finally:
            for layer in self._cache.layers:
                layer.keep(len(self._owner))


@torch.no_grad()
def prefill(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    layout: BlockLayout,
    *,
    tail_room: int,
    tail_offset: int | None = None,
) -> DocumentContext:
    """Runs a prefix and its documents once and keeps their keys and values, without gradients.

    Args:
        model: an attached model.
        input_ids: [T] or [1, T], the tokens ``[prefix][document]...[document]``.
        layout: where they lie: one list of the block pattern, with no tail.
        tail_room: most tokens that a tail will have.
        tail_offset: position of the first tail token, as in :meth:`rankernel.BlockLayout.position_ids`; by default
            that behind the longest document.

    Raises:
        ValueError: another kind of layout, a model that is not attached or whose tails would not be those of a packed
            prompt (see :func:`obstacle`), or numbers out of range.
    """
    if layout.num_lists != 1 or layout.lengths[0][2] or layout.causal or not layout.num_tokens:
        raise ValueError(f"layout: expected one list of the block pattern with no tail, got {layout.lengths}")
    if tail_room < 1:
        raise ValueError(f"tail_room: expected a positive integer, got {tail_room}")
    if not is_attached(model):
        raise ValueError("model: expected an attached model; call rankernel.attach(model) first")
    prefix, documents, _ = layout.lengths[0]
    if tail_offset is None:
        tail_offset = prefix + max(documents, default=0)
    reason = obstacle(model, layout.num_tokens + tail_room, tail_offset + tail_room)
    if reason is not None:
        raise ValueError(f"model: {reason}")
    from transformers import Cache

    layer_class = _context_layer_class()
    cache = Cache(layers=[layer_class(layout.num_tokens + tail_room) for _ in decoder_of(model).layers])
    inputs = model_inputs(input_ids, layout, tail_offset=tail_offset) | {"use_cache": True, "past_key_values": cache}
    # Only keys and values are wanted: asking for one row leaves most of the last layer out.
    final_hidden_states(model, torch.zeros(1, dtype=torch.int64), **inputs)
    return DocumentContext(model, cache, layout, tail_offset, tail_room)


def obstacle(model: torch.nn.Module, num_tokens: int, num_positions: int) -> str | None:
    """Why tails that read kept keys and values would not be those of a packed prompt, or None.

    Args:
        model: an attached model.
        num_tokens: most tokens of the packed prompt.
        num_positions: one more than its last position.
    """
    window = min((window for window in attach(model).windows if window is not None), default=num_tokens)
    if window < num_tokens:
        return (
            f"a sliding window of {window} tokens acts within the prompt's {num_tokens}; it is counted in packed "
            "tokens, so removing a document would move it"
        )
    config = decoder_of(model).config
    rope = getattr(config, "rope_parameters", None) or {}
    for entry in [rope] if "rope_type" in rope else rope.values():
        limit = entry.get("original_max_position_embeddings") or config.max_position_embeddings
        if entry["rope_type"] in _LENGTH_DEPENDENT_ROPE and num_positions > limit:
            return (
                f"its {entry['rope_type']} RoPE turns keys by the largest position of the call once that is beyond "
                f"{limit}, and the prompt has {num_positions} positions"
            )
    return None


@functools.cache
def _context_layer_class() -> Any:
    from transformers.cache_utils import DynamicLayer

    class ContextLayer(DynamicLayer):
        """Keys and values at the beginning of buffers that are allocated once."""

        is_initialized: bool
        keys: torch.Tensor
        values: torch.Tensor

        def __init__(self, capacity: int) -> None:
            super().__init__()
            self.capacity = capacity

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
            if not self.is_initialized:
                self.dtype, self.device = key_states.dtype, key_states.device
                self.buffers = [
                    states.new_empty(*states.shape[:2], self.capacity, states.shape[-1])
                    for states in (key_states, value_states)
                ]
                self.is_initialized = True
                self.keep(0)
            begin = self.keys.shape[2]
            self.keep(begin + key_states.shape[2])
            self.keys[:, :, begin:] = key_states
            self.values[:, :, begin:] = value_states
            return self.keys, self.values

        def keep(self, length: int) -> None:
            self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

        def move(self, source: torch.Tensor, destination: torch.Tensor) -> None:
            source, destination = source.to(self.device), destination.to(self.device)
            for buffer in self.buffers:
                buffer[:, :, destination] = buffer[:, :, source]

    return ContextLayer
