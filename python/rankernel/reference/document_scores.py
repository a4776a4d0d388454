"""What a few query rows attend to: per document (BlockRank, arXiv 2510.05396) and per token (ICR, arXiv 2410.02642)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rankernel.layout import DOCUMENT, BlockLayout
from rankernel.reference.block_attention import attention_logits

Segments = list[tuple[int, int, int]]


def document_logsumexp(
    query: torch.Tensor,
    key: torch.Tensor,
    layout: BlockLayout,
    rows: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Log-sum-exp of each row's attention logits over the visible tokens of each document of its list.

    Returns:
        [R, Hq, max_documents], float32 (float64 for float64 input), -inf where a list has fewer documents, a document
        is empty, or the row sees none of it.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    nothing = query.new_full((query.shape[1],), float("-inf"), dtype=wide)
    scores = []
    for index, row in enumerate(rows.tolist()):
        segments, visible = _visible(layout, row)
        logits = attention_logits(query[index : index + 1], key, scale=scale, softcap=softcap)[:, 0]
        columns = [nothing] * layout.max_documents
        for document, (begin, end, _) in enumerate(segments[1:-1]):
            seen = visible[begin:end]
            if seen.any():
                columns[document] = torch.logsumexp(logits[:, begin:end][:, seen], dim=-1)
        scores.append(torch.stack(columns, dim=-1) if columns else query.new_zeros(query.shape[1], 0, dtype=wide))
    return torch.stack(scores) if scores else query.new_zeros(0, query.shape[1], layout.max_documents, dtype=wide)


def token_attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    layout: BlockLayout,
    rows: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention that every token receives: softmax over all visible keys, mean over a list's rows, sum over heads.

    Returns:
        [T], float32 (float64 for float64 input); zero in lists that have no row.
    """
    mass = query.new_zeros(layout.num_tokens, dtype=torch.promote_types(query.dtype, torch.float32))
    owners = [_list_of(layout, row) for row in rows.tolist()]
    for index, row in enumerate(rows.tolist()):
        _, visible = _visible(layout, row)
        logits = attention_logits(query[index : index + 1], key, scale=scale, softcap=softcap)[:, 0]
        probabilities = torch.softmax(logits.masked_fill(~visible.to(logits.device), float("-inf")), dim=-1)
        mass = mass + probabilities.sum(dim=0) / owners.count(owners[index])
    return mass


def _list_of(layout: BlockLayout, row: int) -> int:
    return next(i for i, segments in enumerate(layout.segments()) if segments[0][0] <= row < segments[-1][1])


def _visible(layout: BlockLayout, row: int) -> tuple[Segments, torch.Tensor]:
    """The segments of the list that holds ``row``, and bool [T], True at every token that ``row`` sees."""
    segments = layout.segments()[_list_of(layout, row)]
    begin, _, role = next(segment for segment in segments if segment[0] <= row < segment[1])
    visible = torch.zeros(layout.num_tokens, dtype=torch.bool)
    visible[segments[0][0] : row + 1] = True
    if role == DOCUMENT and not layout.causal:
        visible[segments[0][1] : begin] = False
    return segments, visible


def document_logsumexp_backward(
    grad: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    layout: BlockLayout,
    rows: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients for query and key: ``dS_rhj = grad_rhd exp(S_rhj - lse_rhd)``, j a visible token of document d."""

    def row_gradient(index: int, logits: torch.Tensor, segments: Segments, visible: torch.Tensor) -> torch.Tensor:
        grad_logits = torch.zeros_like(logits)
        for document, (begin, end, _) in enumerate(segments[1:-1]):
            seen = torch.arange(begin, end, device=logits.device)[visible[begin:end]]
            weights = torch.exp(logits[:, seen] - lse[index, :, document, None])
            grad_logits[:, seen] = grad[index, :, document, None] * weights
        return grad_logits

    return _backward(row_gradient, query, key, layout, rows, scale, softcap)


def token_attention_mass_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    layout: BlockLayout,
    rows: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients for query and key: ``dS_rhj = P_rhj (grad_j - sum_k P_rhk grad_k) / rows of the list``."""
    owners = [_list_of(layout, row) for row in rows.tolist()]

    def row_gradient(index: int, logits: torch.Tensor, segments: Segments, visible: torch.Tensor) -> torch.Tensor:
        probabilities = torch.softmax(logits.masked_fill(~visible, float("-inf")), dim=-1)
        mean = (probabilities * grad).sum(dim=-1, keepdim=True)
        return probabilities * (grad - mean) / owners.count(owners[index])

    return _backward(row_gradient, query, key, layout, rows, scale, softcap)


def _backward(
    row_gradient: Callable[[int, torch.Tensor, Segments, torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    layout: BlockLayout,
    rows: torch.Tensor,
    scale: float | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``dQ = scale dS K`` and ``dK = scale dS^T Q``, with ``dS`` [Hq, T] of every row from ``row_gradient``."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    wide_query, wide_key = query.to(wide), key.to(wide)
    grad_query = torch.zeros_like(wide_query, memory_format=torch.contiguous_format)
    grad_key = torch.zeros_like(wide_key, memory_format=torch.contiguous_format)
    for index, row in enumerate(rows.tolist()):
        segments, visible = _visible(layout, row)
        logits = attention_logits(wide_query[index : index + 1], wide_key, scale=scale, softcap=softcap)[:, 0]
        grad_logits = row_gradient(index, logits, segments, visible.to(logits.device)) * scale
        if softcap is not None:
            grad_logits = grad_logits * (1 - (logits / softcap) ** 2)
        grouped = grad_logits.unflatten(0, (-1, group))
        grad_query[index] = torch.einsum("hgc,chd->hgd", grouped, wide_key).flatten(0, 1)
        grad_key += torch.einsum("hgc,hgd->chd", grouped, wide_query[index].unflatten(0, (-1, group)))
    return grad_query.to(query.dtype), grad_key.to(key.dtype)
