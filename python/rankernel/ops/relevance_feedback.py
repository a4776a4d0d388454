"""FIRST's test-time query update: query vectors learn a teacher's ranking of the documents that they retrieved."""

from __future__ import annotations

import math
from typing import Any

import torch

from rankernel import _C, backends, reference
from rankernel.ops import _checks

# Learning rate and steps as published. The positions are those of FeedbackLoss in csrc/relevance_feedback.h.
_PUBLISHED = {"kl": (0.005, 100), "weighted_ranknet": (0.001, 20)}
_LOSSES = tuple(_PUBLISHED)

_checks.LIBRARY.define(
    "relevance_feedback(Tensor query_vectors, Tensor document_vectors, Tensor teacher_scores, Tensor? where, str loss, "
    "float learning_rate, SymInt num_steps, float? scale) -> Tensor"
)


def relevance_feedback(
    query_vectors: torch.Tensor,
    document_vectors: torch.Tensor,
    teacher_scores: torch.Tensor,
    *,
    loss: str = "kl",
    learning_rate: float | None = None,
    num_steps: int | None = None,
    where: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Query vectors moved towards a reranker's scores of the documents, to retrieve again with.

    Each query q with documents P and teacher scores t takes Adam steps (betas 0.9 and 0.999, epsilon 1e-8, from zero
    moments) on a loss of the logits ``scale * P q``; the documents stay as they are.

    Published in FIRST (arXiv 2406.15657, ``scripts/distill.py``): both losses with their learning rates and steps, the
    optimiser, and the scale ``c / 2``, c the range of t over the range of the initial ``P q``. Its recipe is two calls:
    ``"kl"`` with the scores of a cross-encoder, then ``"weighted_ranknet"`` from the result with those of an LLM.
    Ours: equal teacher scores form no pair and share the best rank; a query stays as it is that has fewer than two
    valid documents, or whose c would be zero or undefined because all its teacher scores or all its dot products are
    equal.

    For inference: nothing is differentiable, and inputs that require gradients are taken as constants.

    Args:
        query_vectors: [B, D], any floating-point dtype; updated in float32.
        document_vectors: [B, k, D], float32, bfloat16 or float16, read as they are; documents that all queries share
            may be expanded, without a copy.
        teacher_scores: [B, k], any floating-point dtype; the higher the better.
        loss: ``"kl"``: ``KL(softmax(t) || softmax(logits))``; ``"weighted_ranknet"``: mean over the pairs
            ``t_i > t_j`` of ``log(1 + exp(logits_j - logits_i)) / (r_i + r_j)``, r the teacher's ranks from 1.
        learning_rate: of Adam; None: 0.005 for ``"kl"``, 0.001 for ``"weighted_ranknet"``.
        num_steps: of Adam; None: 100 for ``"kl"``, 20 for ``"weighted_ranknet"``.
        where: [B, k] bool, False for documents to leave out. These, and their scores, may hold anything, NaN included.
        scale: the whole factor of the dot products, for every query; None: c / 2.

    Returns:
        float32 [B, D], never the input itself (float64 for float64 vectors, which run the reference).

    Raises:
        ValueError: shapes, devices, names or numbers that do not fit, naming the argument.
        TypeError: a wrong dtype.
    """
    if loss not in _PUBLISHED:
        raise ValueError(f"loss: expected one of {', '.join(map(repr, _LOSSES))}, got {loss!r}")
    if learning_rate is None:
        learning_rate = _PUBLISHED[loss][0]
    if num_steps is None:
        num_steps = _PUBLISHED[loss][1]
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 0:
        raise ValueError(f"num_steps: expected an integer of at least 0, got {num_steps!r}")
    for name, value in (("learning_rate", learning_rate), ("scale", scale)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive finite number, got {value!r}")
    return torch.ops.rankernel.relevance_feedback(
        query_vectors.detach(), document_vectors.detach(), teacher_scores.detach(), where, loss, learning_rate,
        num_steps, scale,
    )  # fmt: skip


def _check(queries: torch.Tensor, documents: torch.Tensor, teacher: torch.Tensor, where: torch.Tensor | None) -> None:
    tensors = {"query_vectors": queries, "document_vectors": documents, "teacher_scores": teacher}
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if where is not None:
        if where.dtype != torch.bool:
            raise TypeError(f"where: expected torch.bool, got {where.dtype}")
        tensors["where"] = where
    if queries.dim() != 2:
        raise ValueError(f"query_vectors: expected 2 dimensions [queries, size], got {list(queries.shape)}")
    if documents.dim() != 3 or documents.shape[::2] != queries.shape:
        expected = f"[{queries.shape[0]}, documents, {queries.shape[1]}]"
        raise ValueError(f"document_vectors: expected shape {expected}, got {list(documents.shape)}")
    for name, tensor in tensors.items():
        if name in ("teacher_scores", "where") and tensor.shape != documents.shape[:2]:
            raise ValueError(f"{name}: expected shape {list(documents.shape[:2])}, got {list(tensor.shape)}")
        if tensor.device != queries.device:
            raise ValueError(f"{name}: expected the device of query_vectors, {queries.device}, got {tensor.device}")
    if not (teacher if where is None else teacher[where]).isfinite().all():
        raise ValueError("teacher_scores: expected finite numbers; leave documents without a score out by where")


def _why_no_kernel(queries: torch.Tensor, documents: torch.Tensor) -> str | None:
    if documents.device.type != "cpu":
        return f"there is no kernel for {documents.device.type} tensors yet"
    for tensor in (documents, queries):
        if tensor.dtype not in _checks.NATIVE_DTYPES:
            return f"there is no kernel for {tensor.dtype}"
    return None


def _forward(
    query_vectors: torch.Tensor,
    document_vectors: torch.Tensor,
    teacher_scores: torch.Tensor,
    where: torch.Tensor | None,
    loss: str,
    learning_rate: float,
    num_steps: int,
    scale: float | None,
) -> torch.Tensor:
    _check(query_vectors, document_vectors, teacher_scores, where)
    if backends.native_refused("relevance_feedback", _why_no_kernel(query_vectors, document_vectors)):
        return reference.relevance_feedback(
            query_vectors, document_vectors, teacher_scores, loss=loss, learning_rate=learning_rate,
            num_steps=num_steps, where=where, scale=scale,
        )  # fmt: skip
    updated = query_vectors.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    documents = _checks.rows_contiguous(document_vectors)
    teacher = teacher_scores.to(torch.float32).contiguous()
    where = None if where is None else where.contiguous()
    _C.relevance_feedback(
        backends.isa_level(),
        _checks.NATIVE_DTYPES[documents.dtype],
        updated.data_ptr(),
        _checks.address(documents),
        teacher.data_ptr(),
        0 if where is None else where.data_ptr(),
        (documents.shape[0], documents.shape[1], documents.shape[2]),
        _LOSSES.index(loss),
        learning_rate,
        num_steps,
        scale or 0.0,
        torch.get_num_threads(),
    )
    return updated


def _fake(query_vectors: torch.Tensor, document_vectors: torch.Tensor, *_: Any) -> torch.Tensor:
    wide = torch.promote_types(torch.promote_types(query_vectors.dtype, document_vectors.dtype), torch.float32)
    return query_vectors.new_empty(query_vectors.shape, dtype=wide)


_checks.LIBRARY.impl("relevance_feedback", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("rankernel::relevance_feedback", _fake, lib=_checks.LIBRARY)
