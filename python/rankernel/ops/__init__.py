"""Public ops: checks, ``torch.library`` registration, choice of backend."""

from rankernel.ops.block_attention import block_attention
from rankernel.ops.candidate_logits import candidate_logits
from rankernel.ops.document_scores import document_logsumexp, token_attention_mass
from rankernel.ops.listwise_loss import listwise_loss
from rankernel.ops.lora_linear import lora_linear, lora_update, multi_lora_linear, segment_lora_linear
from rankernel.ops.relevance_feedback import relevance_feedback

__all__ = [
    "block_attention",
    "candidate_logits",
    "document_logsumexp",
    "listwise_loss",
    "lora_linear",
    "lora_update",
    "multi_lora_linear",
    "relevance_feedback",
    "segment_lora_linear",
    "token_attention_mass",
]
