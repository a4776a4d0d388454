"""The attention function that attached models call, and the keyword arguments that reach it through ``model(...)``."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch

from rankernel.layout import BlockLayout, moved_to
from rankernel.ops import block_attention, document_logsumexp, token_attention_mass

NAME = "rankernel"
"""Name of the attention implementation: ``model.config._attn_implementation`` of an attached model."""

STOCK_ATTRIBUTE = "_rankernel_stock"
"""Attribute of every attention module of an attached model; holds a :class:`Stock`."""

_UNSUPPORTED = ("cu_seq_lens_q", "cu_seq_lens_k", "position_bias")


class Stock(NamedTuple):
    """The implementation that a model had before ``attach``: what runs when there is no layout."""

    name: str
    forward: Callable[..., Any]


class Request(ABC):
    """What an attached model shall return in ``outputs.attentions``; travels as the keyword argument ``block_scores``.

    With ``output_attentions=True`` there is one result per requested layer, in the order of ``layers``. Results never
    use a sliding window, not even on sliding-window layers: a document outside the window would have no score. A plain
    class for the reason :class:`rankernel.BlockLayout` is one.

    Attributes:
        layers: the requested layers, ascending, without repetition.
        row_groups: int64 [R] each, packed positions of query rows.
    """

    def __init__(self, layers: Iterable[int], row_groups: Sequence[torch.Tensor]) -> None:
        self.layers = tuple(sorted(set(layers)))
        if not self.layers or self.layers[0] < 0:
            raise ValueError(f"layers: expected at least one index, each at least 0, got {list(self.layers)}")
        for rows in row_groups:
            if rows.dim() != 1:
                raise ValueError(f"rows: expected one dimension, got shape {list(rows.shape)}")
            if rows.dtype.is_floating_point or rows.dtype == torch.bool:
                raise TypeError(f"rows: expected integers, got {rows.dtype}")
        self.row_groups = tuple(rows.to(torch.int64) for rows in row_groups)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """The same request with its rows on ``device``; itself where they are there already."""
        if all(rows.device == torch.device(device) for rows in self.row_groups):
            return self
        moved = copy.copy(self)
        moved.row_groups = tuple(moved_to(rows, device, non_blocking) for rows in self.row_groups)
        return moved

    @abstractmethod
    def scores(
        self, query: torch.Tensor, key: torch.Tensor, layout: BlockLayout, layer: int, **logits: float | None
    ) -> torch.Tensor:
        """Result of one layer.

        Args:
            query: [T, Hq, D], on the device of the rows.
            key: [T, Hkv, D].
            layout: where the lists lie.
            layer: index of the layer.
            logits: its ``scale`` and ``softcap``.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={self.layers}, rows={[rows.numel() for rows in self.row_groups]})"


class ScoreRequest(Request):
    """Asks for one :func:`rankernel.document_logsumexp` result per layer, float32 [R, Hq, max_documents].

    Attributes:
        layers: the requested layers, ascending, without repetition.
        rows: int64 [R], packed positions of the query rows.
    """

    def __init__(self, layers: Iterable[int], rows: torch.Tensor) -> None:
        """
        Raises:
            ValueError: no layer or a negative one, or ``rows`` that is not one-dimensional.
            TypeError: ``rows`` that are not integers.
        """
        super().__init__(layers, [rows])

    @property
    def rows(self) -> torch.Tensor:
        return self.row_groups[0]

    def scores(
        self, query: torch.Tensor, key: torch.Tensor, layout: BlockLayout, layer: int, **logits: float | None
    ) -> torch.Tensor:
        """See :meth:`Request.scores`."""
        return document_logsumexp(query[self.rows], key, layout, self.rows, **logits)


class MassRequest(Request):
    """Asks for the attention that every packed token receives, once for each group of query rows.

    Per layer float32 [groups, T], :func:`rankernel.token_attention_mass` of every group: in each list the mean over
    the group's rows there, summed over heads; with ``per_head`` float32 [groups, heads, T] instead.

    Attributes:
        layers: the requested layers, ascending, without repetition.
        row_groups: int64 [R] each, packed positions of query rows.
        heads: by layer, the query heads that count, in this order; None counts all.
        per_head: whether heads stay apart.
    """

    def __init__(
        self,
        layers: Iterable[int],
        row_groups: Sequence[torch.Tensor],
        *,
        heads: Mapping[int, Sequence[int]] | None = None,
        per_head: bool = False,
    ) -> None:
        """
        Raises:
            ValueError: no layer or a negative one, no group, rows that are not one-dimensional, or a requested layer
                that ``heads`` lacks.
            TypeError: rows that are not integers.
        """
        super().__init__(layers, row_groups)
        if not self.row_groups:
            raise ValueError("row_groups: expected at least one group, got none")
        if heads is not None and not all(heads.get(layer) for layer in self.layers):
            raise ValueError(f"heads: expected some for each of the layers {list(self.layers)}, got {dict(heads)}")
        self.heads = heads
        self.per_head = per_head

    def scores(
        self, query: torch.Tensor, key: torch.Tensor, layout: BlockLayout, layer: int, **logits: float | None
    ) -> torch.Tensor:
        """See :meth:`Request.scores`.

        Raises:
            ValueError: a head that the model does not have.
        """
        if self.heads is not None:
            heads, num_heads = list(self.heads[layer]), query.shape[1]
            if not 0 <= min(heads) <= max(heads) < num_heads:
                raise ValueError(f"heads: expected indices in [0, {num_heads}), got {heads} for layer {layer}")
            group = num_heads // key.shape[1]
            index = moved_to(torch.tensor(heads), query.device, non_blocking=True)
            query, key = query[:, index], key[:, index // group]

        def masses(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return torch.stack(
                [token_attention_mass(query[rows], key, layout, rows, **logits) for rows in self.row_groups]
            )

        if not self.per_head:
            return masses(query, key)
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return torch.stack(
            [masses(*of_head) for of_head in zip(query.split(1, dim=1), keys.split(1, dim=1), strict=True)], dim=1
        )


def model_inputs(
    input_ids: torch.Tensor,
    layout: BlockLayout,
    *,
    position_ids: torch.Tensor | None = None,
    position_scheme: Literal["shared", "sequential"] = "shared",
    tail_offset: int = 16384,
    scores: Request | None = None,
) -> dict[str, Any]:
    """Keyword arguments with which an attached model reads a packed row: ``model(**model_inputs(input_ids, layout))``.

    The attention mask among them is an empty stand-in: being four-dimensional it keeps Transformers from building
    one, and being empty it makes a model that is not attached fail instead of ignoring the layout.

    Args:
        input_ids: [T] or [1, T], the packed tokens; their device is that of the result.
        layout: where the lists lie.
        position_ids: [T] or [1, T], instead of those of ``layout.position_ids(position_scheme, tail_offset)``.
        position_scheme: see :meth:`rankernel.BlockLayout.position_ids`.
        tail_offset: position of the first tail token under ``"shared"``; choose it inside the range of positions
            that the model knows.
        scores: what to return in ``outputs.attentions``: a :class:`ScoreRequest` or a :class:`MassRequest`.

    Raises:
        ValueError: shapes or positions that do not fit the layout; rows outside it, if they are on the CPU.
    """
    input_ids = _packed_row("input_ids", input_ids, layout)
    device = input_ids.device
    layout = layout.to(device)
    if position_ids is None:
        position_ids = layout.position_ids(position_scheme, tail_offset)
    inputs = {
        "input_ids": input_ids,
        "position_ids": moved_to(_packed_row("position_ids", position_ids, layout), device, non_blocking=True),
        "attention_mask": torch.empty(1, 1, 0, 0, device=device),
        "use_cache": False,
        "block_layout": layout,
    }
    if scores is not None:
        for rows in scores.row_groups:
            if rows.is_cuda or not rows.numel():
                continue  # reading rows of a GPU would wait for it
            if not 0 <= int(rows.min()) <= int(rows.max()) < layout.num_tokens:
                raise ValueError(f"scores: expected rows in [0, {layout.num_tokens}), got {rows.tolist()}")
        inputs |= {"block_scores": scores.to(device, non_blocking=True), "output_attentions": True}
    return inputs


def register() -> None:
    """Makes :data:`NAME` known to Transformers; again and again without harm.

    The mask function is the stock ``sdpa_mask``: without a registered one Transformers would drop padding masks.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    block_layout: BlockLayout | None = None,
    block_scores: Request | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What Transformers calls in every layer of an attached model.

    Args:
        module: the attention module.
        query: [B, Hq, Tq, D], after RoPE; with a layout B is 1 and Tq the number of packed tokens.
        key: [B, Hkv, Tk, D].
        value: [B, Hkv, Tk, D].
        attention_mask: of the stock ``sdpa_mask``; ignored with a layout.
        block_layout: where the lists lie; without one the model's previous implementation runs.
        block_scores: which scores to return.
        kwargs: scaling, dropout, sliding_window, softcap, s_aux and more, depending on the family.

    Returns:
        out [B, Tq, Hq, D] and, on the layers that ``block_scores`` names, its scores.

    Raises:
        ValueError: inputs that a layout excludes, saying which and why.
        TypeError: a ``block_layout`` that is none.
    """
    if kwargs.get("cache") is not None:
        raise ValueError("cache: continuous batching goes by the name of the stock attention; detach the model first")
    if block_layout is None:
        if block_scores is not None:
            raise ValueError("block_scores: expected together with block_layout, got no layout")
        return _stock_forward(module, query, key, value, attention_mask, **kwargs)
    _check_packed(query, key, block_layout, kwargs)
    layout = block_layout
    if layout.cu_seqlens.device != query.device:
        layout = layout.to(query.device)
    query, key, value = tokens_first(query), tokens_first(key), tokens_first(value)
    scale, softcap = kwargs.get("scaling"), kwargs.get("softcap")
    window, sinks = kwargs.get("sliding_window"), kwargs.get("s_aux")
    out: Any = block_attention(query, key, value, layout, scale=scale, window=window, softcap=softcap, sinks=sinks)
    scores = None
    if block_scores is not None and module.layer_idx in block_scores.layers:
        layer: Any = module.layer_idx
        scores = block_scores.to(query.device).scores(query, key, layout, layer, scale=scale, softcap=softcap)
    return out[None], scores


def tokens_first(tensor: torch.Tensor) -> torch.Tensor:
    """[1, H, T, D] as [T, H, D], a view; under autocast in its dtype, as PyTorch's own attention takes its inputs.

    Autocast leaves rotated queries and keys in float32, but not values.
    """
    if torch.is_autocast_enabled(tensor.device.type):
        tensor = tensor.to(torch.get_autocast_dtype(tensor.device.type))
    return tensor[0].transpose(0, 1)


def _stock_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    stock: Stock | None = getattr(module, STOCK_ATTRIBUTE, None)
    if stock is None:
        raise ValueError(
            f"attn_implementation: {NAME!r} was set on this model without rankernel.attach(model), so what to run "
            "without a layout is not known; load the model with its own attention and attach it"
        )
    if stock.name == "eager":
        attention_mask = _additive_mask(attention_mask, query, key)
    return stock.forward(module, query, key, value, attention_mask, **kwargs)


def _additive_mask(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The mask of Transformers' ``eager_mask`` from that of its ``sdpa_mask``.

    ``sdpa_mask`` gives None for one row that sees all keys, and for rows 0, 1, ... that see keys causally from the
    first (a static cache then has further, unwritten keys).
    """
    if mask is None:
        rows, columns = query.shape[2], key.shape[2]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device)[None, None]
        mask = mask.tril() if rows > 1 else mask
    if mask.dtype != torch.bool:
        return mask
    return torch.where(mask, torch.zeros((), dtype=query.dtype, device=mask.device), torch.finfo(query.dtype).min)


def _check_packed(query: torch.Tensor, key: torch.Tensor, layout: BlockLayout, kwargs: dict[str, Any]) -> None:
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"block_layout: expected a BlockLayout, got {type(layout).__name__}")
    if query.shape[0] != 1:
        raise ValueError(
            f"input_ids: expected a batch of 1 with a block_layout, got {query.shape[0]}; pack the lists in one row"
        )
    if query.shape[2] != layout.num_tokens:
        raise ValueError(f"input_ids: expected {layout.num_tokens} tokens as in block_layout, got {query.shape[2]}")
    if key.shape[2] != layout.num_tokens:
        raise ValueError(
            f"past_key_values: expected an empty cache or none with a block_layout of {layout.num_tokens} tokens, "
            f"got keys for {key.shape[2]}"
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None with a block_layout, which alone says who sees whom")
    if kwargs.get("dropout"):
        raise ValueError(
            f"attention_dropout: expected 0 with a block_layout, got {kwargs['dropout']}; the kernels have no dropout, "
            "so set config.attention_dropout and the modules' attention_dropout to 0 or call model.eval()"
        )


def _packed_row(name: str, tensor: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """The tensor as [1, T]."""
    row = tensor[None] if tensor.dim() == 1 else tensor
    if row.shape != (1, layout.num_tokens):
        expected = f"[{layout.num_tokens}] or [1, {layout.num_tokens}]"
        raise ValueError(f"{name}: expected shape {expected} as in layout, got {list(tensor.shape)}")
    return row
