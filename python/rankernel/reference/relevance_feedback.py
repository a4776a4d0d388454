"""FIRST's test-time query update (arXiv 2406.15657, scripts/distill.py of gangiswag/llm-reranker), query by query."""

from __future__ import annotations

import torch

from rankernel.listwise import Settings
from rankernel.reference.listwise_loss import listwise_loss

_LOSSES = {
    "kl": ("kl_distillation", Settings()),
    "weighted_ranknet": ("weighted_ranknet", Settings(divisor=1)),  # the mean over pairs
}


def relevance_feedback(
    query_vectors: torch.Tensor,
    document_vectors: torch.Tensor,
    teacher_scores: torch.Tensor,
    *,
    loss: str,
    learning_rate: float,
    num_steps: int,
    where: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """See :func:`rankernel.relevance_feedback`; computes, and returns [B, D], in the widest dtype of the inputs."""
    wide = torch.promote_types(torch.promote_types(query_vectors.dtype, document_vectors.dtype), torch.float32)
    kind, settings = _LOSSES[loss]
    if where is None:
        where = torch.ones_like(teacher_scores, dtype=torch.bool)
    # Also inside no_grad() and inference_mode(), where training a vector is not expected but what this does.
    with torch.inference_mode(False), torch.enable_grad():
        updated = query_vectors.detach().to(wide, copy=True, memory_format=torch.contiguous_format)
        for index, valid in enumerate(where):
            documents = document_vectors[index].detach()[valid].to(wide)
            teacher = teacher_scores[index].detach()[valid].to(wide)
            if len(teacher) < 2:
                continue
            factor = scale
            if factor is None:
                ranges = _range(teacher), _range((documents * updated[index]).sum(dim=-1))
                if 0 in ranges:
                    continue
                factor = ranges[0] / ranges[1] / 2
            query = updated[index].clone().requires_grad_()
            optimizer = torch.optim.Adam([query], lr=learning_rate)
            offsets = torch.tensor([0, len(teacher)])
            for _ in range(num_steps):
                optimizer.zero_grad()
                listwise_loss(factor * (documents @ query), teacher, offsets, None, kind, "sum", settings).backward()
                optimizer.step()
            updated[index] = query.detach()
    return updated


def _range(values: torch.Tensor) -> float:
    return (values.max() - values.min()).item()
