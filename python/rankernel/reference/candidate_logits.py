"""Logits of a few vocabulary entries, or their log-probabilities; autograd gives its gradients."""

from __future__ import annotations

import torch


def candidate_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    candidates: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    log_probs: bool = False,
) -> torch.Tensor:
    """See :func:`rankernel.candidate_logits`; holds all logits of the vocabulary, and computes in the widest dtype.

    ``z = softcap * tanh(scale * (h . W_v + b_v) / softcap)``, and for log-probabilities ``z_v - log sum_u exp(z_u)``.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if log_probs:
        logits = logits.log_softmax(dim=-1)
    return logits.gather(1, candidates.to(torch.int64).expand(len(hidden), candidates.shape[-1]))
