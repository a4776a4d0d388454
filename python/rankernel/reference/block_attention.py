"""Block-sparse in-context-ranking attention, segment by segment (BlockRank, arXiv 2510.05396, section 3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rankernel.layout import DOCUMENT, BlockLayout


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(mask(softcap(scale * Q K^T)), sinks) V`` over the keys that ``layout`` lets each row see.

    Logits and softmax are float32, or float64 for float64 input; probabilities are rounded to the input dtype before
    they meet V, as PyTorch's eager attention does.

    Returns:
        ``out`` [T, Hq, D] in the dtype of ``query`` and ``lse`` [T, Hq], the natural log of the softmax denominator,
        sinks included.
    """
    out = torch.zeros_like(query)
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = torch.empty(query.shape[:2], dtype=wide, device=query.device)
    out_parts, lse_parts = [], []
    index = torch.arange(query.shape[0], device=query.device)
    for begin, end, columns in _row_blocks(layout, index):
        distance = index[begin:end, None] - columns[None, :]
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        logits = attention_logits(query[begin:end], key[columns], scale=scale, softcap=softcap)
        logits = logits.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            column = sinks.to(wide)[:, None, None].expand(-1, end - begin, 1)
            logits = torch.cat([logits, column], dim=-1)
        probabilities = torch.softmax(logits, dim=-1)[..., : columns.numel()].to(query.dtype)
        values = value[columns].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        out_parts.append(torch.einsum("hrc,chd->rhd", probabilities, values))
        lse_parts.append(torch.logsumexp(logits, dim=-1).transpose(0, 1))
    if out_parts:
        out, lse = torch.cat(out_parts), torch.cat(lse_parts)
    return out, lse


def _row_blocks(layout: BlockLayout, index: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Per segment, its rows ``begin, end`` and the columns that hold every key those rows may see."""
    for segments in layout.segments():
        first, prefix_end = segments[0][0], segments[0][1]
        for begin, end, role in segments:
            if role == DOCUMENT and not layout.causal:
                yield begin, end, torch.cat([index[first:prefix_end], index[begin:end]])
            else:
                yield begin, end, index[first:end]


def attention_logits(
    query: torch.Tensor, key: torch.Tensor, *, scale: float | None, softcap: float | None
) -> torch.Tensor:
    """``softcap * tanh(scale * Q K^T / softcap)``, [Hq, rows, columns], float32 or wider; no mask."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = torch.einsum("rhd,chd->hrc", query, keys)
    logits = logits.to(torch.promote_types(query.dtype, torch.float32)) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def block_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`block_attention` for query, key, value and sinks (empty without sinks).

    With ``P = exp(S - lse)``, ``dP = dO V^T`` and ``delta = sum(P dP) - dlse`` per row: ``dV = P^T dO``,
    ``dS = P (dP - delta)``, ``dQ = scale dS K``, ``dK = scale dS^T Q``, ``dsink = -sum exp(sink - lse) delta``; under a
    softcap dS is multiplied by ``1 - (S / softcap)^2``. One segment at a time.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[1] // key.shape[1]
    grad_out, wide_query, wide_key, wide_value = (t.to(wide) for t in (grad_out, query, key, value))
    delta = -grad_lse.to(wide)
    grad_query = torch.zeros_like(wide_query, memory_format=torch.contiguous_format)
    grad_key = torch.zeros_like(wide_key, memory_format=torch.contiguous_format)
    grad_value = torch.zeros_like(wide_value, memory_format=torch.contiguous_format)
    index = torch.arange(query.shape[0], device=query.device)
    for begin, end, columns in _row_blocks(layout, index):
        distance = index[begin:end, None] - columns[None, :]
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        # Heads as [Hkv, group]: sums over the group's heads are the gradients of the shared key and value.
        q, g = (t[begin:end].unflatten(1, (-1, group)) for t in (wide_query, grad_out))
        logits = torch.einsum("rhgd,chd->hgrc", q, wide_key[columns]) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        row_lse = lse[begin:end].T.unflatten(0, (-1, group))[..., None]
        probabilities = torch.exp(logits - row_lse).masked_fill(~visible, 0.0)
        grad_probabilities = torch.einsum("rhgd,chd->hgrc", g, wide_value[columns])
        delta[begin:end] += (probabilities * grad_probabilities).sum(dim=-1).flatten(0, 1).T
        row_delta = delta[begin:end].T.unflatten(0, (-1, group))[..., None]
        grad_logits = probabilities * (grad_probabilities - row_delta)
        if softcap is not None:
            grad_logits = grad_logits * (1 - (logits / softcap) ** 2)
        grad_logits = grad_logits * scale
        grad_value.index_add_(0, columns, torch.einsum("hgrc,rhgd->chd", probabilities, g))
        grad_key.index_add_(0, columns, torch.einsum("hgrc,rhgd->chd", grad_logits, q))
        grad_query[begin:end] = torch.einsum("hgrc,chd->rhgd", grad_logits, wide_key[columns]).flatten(1, 2)
    if sinks is None:
        grad_sinks = query.new_empty(0)
    else:
        grad_sinks = -(torch.exp(sinks.to(wide) - lse) * delta).sum(dim=0).to(sinks.dtype)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), grad_sinks
