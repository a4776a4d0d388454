"""The specification of every op in plain PyTorch: any dtype and device. Tests and benchmarks import it."""

from rankernel.reference.block_attention import block_attention, block_attention_backward
from rankernel.reference.candidate_logits import candidate_logits
from rankernel.reference.document_scores import (
    document_logsumexp,
    document_logsumexp_backward,
    token_attention_mass,
    token_attention_mass_backward,
)
from rankernel.reference.listwise_loss import listwise_loss
from rankernel.reference.lora_linear import (
    keep_mask,
    lora_expand,
    lora_linear,
    lora_shrink,
    segment_lora_linear,
)
from rankernel.reference.relevance_feedback import relevance_feedback

__all__ = [
    "block_attention",
    "block_attention_backward",
    "candidate_logits",
    "document_logsumexp",
    "document_logsumexp_backward",
    "keep_mask",
    "listwise_loss",
    "lora_expand",
    "lora_linear",
    "lora_shrink",
    "relevance_feedback",
    "segment_lora_linear",
    "token_attention_mass",
    "token_attention_mass_backward",
]
