"""The CUDA extension, built with RANKERNEL_CUDA=ON: csrc/cuda/bindings.cpp."""

from collections.abc import Sequence

def covered_kinds() -> list[int]: ...
def listwise_loss_workspace(
    sizes: tuple[int, int],  # items, lists
    kind: int,
    settings: Sequence[float],
    /,
) -> int: ...
def listwise_loss(
    dtype: int,
    inputs: tuple[int, int, int, int],  # device addresses of scores, labels, where (0: none), offsets
    sizes: tuple[int, int],  # items, lists
    kind_and_reduction: tuple[int, int],
    settings: Sequence[float],
    seed: int,
    outputs: tuple[int, int],  # device addresses of loss, grad
    workspace: int,  # device address, aligned to 16 bytes
    stream: int,
    /,
) -> int: ...
def candidate_logits_workspace(num_rows: int, vocabulary: int, log_probs: bool, /) -> int: ...
def candidate_logits(
    dtype: int,
    hidden: tuple[int, int],  # device address, stride
    weight: tuple[int, int],
    candidates: tuple[int, int],  # stride 0: the same for every row
    bias: int,  # 0: none
    sizes: tuple[int, int, int, int],  # rows, vocabulary, hidden size, candidates
    scale: float,
    softcap: float,  # 0: none
    out: int,
    lse: int,  # 0: logits
    workspace: int,  # device address, aligned to 16 bytes
    stream: int,
    /,
) -> int: ...
def document_scores_workspace(
    name: str,  # of the op, as below
    num_rows: int,
    num_tokens: int,
    num_segments: int,
    max_documents: int,
    heads: tuple[int, int, int],
    /,
) -> int: ...
def document_logsumexp(
    dtype: int,
    query: tuple[int, int, int],  # device address, token stride, head stride
    key: tuple[int, int, int],
    rows: int,
    num_rows: int,
    out: int,
    max_documents: int,
    layout: tuple[int, int, int, int, bool],  # device addresses of cu_seqlens, list_offsets; segments, lists; causal
    num_tokens: int,
    heads: tuple[int, int, int],  # query heads, KV heads, head size
    scale: float,
    softcap: float,  # 0: none
    workspace: int,  # device address, aligned to 16 bytes
    stream: int,
    /,
) -> int: ...
def document_logsumexp_backward(
    dtype: int,
    query: tuple[int, int, int],
    key: tuple[int, int, int],
    rows: int,
    num_rows: int,
    out: int,
    max_documents: int,
    layout: tuple[int, int, int, int, bool],
    num_tokens: int,
    heads: tuple[int, int, int],
    scale: float,
    softcap: float,
    grad: int,
    grad_query: int,
    grad_key: int,
    workspace: int,
    stream: int,
    /,
) -> int: ...

token_attention_mass = document_logsumexp
token_attention_mass_backward = document_logsumexp_backward

def lora_shrink(
    x_dtype: int,
    factor_dtype: int,
    x: tuple[int, int],  # device address, stride
    sizes: tuple[int, int, int],  # rows, size, width of sums and coefficients
    factors: Sequence[tuple[int, int, int, int, int, float, int, int, int]],  # fields of LoraFactor
    sums: tuple[int, int],  # address 0: not wanted
    coefficients: tuple[int, int],  # address 0: no gradients
    segments: tuple[int, int, int],  # device addresses of offsets (0: none) and adapters, number
    dropout: tuple[int, int],  # threshold (0: none), device address of the seed
    stream: int,
    /,
) -> int: ...
def lora_expand(
    out_dtype: int,
    factor_dtype: int,
    out: tuple[int, int],
    sizes: tuple[int, int],  # rows, size
    factors: Sequence[tuple[int, int, int, int, int, float, int, int, int]],
    coefficients: tuple[int, int],
    segments: tuple[int, int, int],
    dropout: tuple[int, int],
    stream: int,
    /,
) -> int: ...
