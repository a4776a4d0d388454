"""The cases of each op, one module an op. A new op is a new module and its name here.

A case module has ``CASES``, a tuple of ``measure.Case``.
"""

MODULES = (
    "block_attention",
    "candidate_logits",
    "document_scores",
    "latency",
    "listwise_loss",
    "lora_linear",
    "lora_training",
    "model",
    "rerankers",
)
