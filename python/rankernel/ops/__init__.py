"""Public ops: checks, ``torch.library`` registration, choice of backend."""

from rankernel.ops.block_attention import block_attention
from rankernel.ops.document_scores import document_logsumexp, token_attention_mass

__all__ = ["block_attention", "document_logsumexp", "token_attention_mass"]
