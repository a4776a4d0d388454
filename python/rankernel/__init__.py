"""rankernel: compiled kernels that make LLM rerankers fast.

Ops: :func:`block_attention`, :func:`document_logsumexp`, :func:`token_attention_mass` over a :class:`BlockLayout`;
:func:`candidate_logits` of a few tokens; :func:`lora_linear`, :func:`multi_lora_linear` and
:func:`segment_lora_linear` for low-rank adapters; :func:`listwise_loss` over lists of scores;
:func:`relevance_feedback` on query vectors.
Models: :func:`attach` to a Hugging Face model, :func:`fuse_lora` to its PEFT adapters.
Rerankers: :mod:`rankernel.rerankers`.
"""

import torch  # noqa: F401  before _C, so that both share torch's OpenMP runtime

from rankernel import backends
from rankernel.layout import BlockLayout
from rankernel.models import (
    MassRequest,
    ScoreRequest,
    attach,
    attached,
    detach,
    early_exit,
    fuse_lora,
    mixed_adapters,
    model_inputs,
    unfuse_lora,
)
from rankernel.ops import (
    block_attention,
    candidate_logits,
    document_logsumexp,
    listwise_loss,
    lora_linear,
    lora_update,
    multi_lora_linear,
    relevance_feedback,
    segment_lora_linear,
    token_attention_mass,
)

__version__ = "0.1.0"

__all__ = [
    "BlockLayout",
    "MassRequest",
    "ScoreRequest",
    "attach",
    "attached",
    "backends",
    "block_attention",
    "candidate_logits",
    "detach",
    "document_logsumexp",
    "early_exit",
    "fuse_lora",
    "listwise_loss",
    "lora_linear",
    "lora_update",
    "mixed_adapters",
    "model_inputs",
    "multi_lora_linear",
    "relevance_feedback",
    "segment_lora_linear",
    "token_attention_mass",
    "unfuse_lora",
]
