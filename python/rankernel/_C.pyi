"""The native extension: csrc/bindings.cpp."""

from collections.abc import Sequence

Tensor = tuple[int, int, int]  # address, token stride, head stride, in elements
Rows = tuple[int, int]  # address, stride in elements
Layout = tuple[int, int, int, int, bool]  # addresses of cu_seqlens and list_offsets, segments, lists, causal
Heads = tuple[int, int, int]  # query heads, KV heads, head size
# Address, rank, strides of ranks and columns; column, scale; address (0: none) and strides of the gradient
Factor = tuple[int, int, int, int, int, float, int, int, int]
Segments = tuple[int, int, int]  # addresses of offsets (0: none) and adapters, count

def isas() -> list[str]: ...
def missing_features() -> dict[str, str]: ...
def kernels(op: str) -> list[tuple[str, list[str]]]: ...
def selected_isa(op: str, dtype: int, isa: int, /) -> str: ...
def block_attention(
    isa: int,
    dtype: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: int,
    sinks: int,
    layout: Layout,
    num_tokens: int,
    heads: Heads,
    scale: float,
    softcap: float,
    window: int,
    num_threads: int,
    /,
) -> int: ...
def block_attention_backward(
    grad_out: Tensor,
    grad_lse: int,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_sinks: int,  # 0: none
    isa: int,
    dtype: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: int,
    sinks: int,
    layout: Layout,
    num_tokens: int,
    heads: Heads,
    scale: float,
    softcap: float,
    window: int,
    num_threads: int,
    /,
) -> int: ...
def document_logsumexp(
    isa: int,
    dtype: int,
    query: Tensor,
    key: Tensor,
    rows: int,
    num_rows: int,
    out: int,
    max_documents: int,
    layout: Layout,
    num_tokens: int,
    heads: Heads,
    scale: float,
    softcap: float,
    num_threads: int,
    /,
) -> int: ...
def document_logsumexp_backward(
    isa: int,
    dtype: int,
    query: Tensor,
    key: Tensor,
    rows: int,
    num_rows: int,
    out: int,
    max_documents: int,
    layout: Layout,
    num_tokens: int,
    heads: Heads,
    scale: float,
    softcap: float,
    num_threads: int,
    grad_out: int,
    grad_query: int,
    grad_key: int,
    /,
) -> int: ...
def token_attention_mass(
    isa: int,
    dtype: int,
    query: Tensor,
    key: Tensor,
    rows: int,
    num_rows: int,
    out: int,
    max_documents: int,
    layout: Layout,
    num_tokens: int,
    heads: Heads,
    scale: float,
    softcap: float,
    num_threads: int,
    /,
) -> int: ...
def token_attention_mass_backward(
    isa: int,
    dtype: int,
    query: Tensor,
    key: Tensor,
    rows: int,
    num_rows: int,
    out: int,
    max_documents: int,
    layout: Layout,
    num_tokens: int,
    heads: Heads,
    scale: float,
    softcap: float,
    num_threads: int,
    grad_out: int,
    grad_query: int,
    grad_key: int,
    /,
) -> int: ...
def listwise_loss(
    isa: int,
    dtype: int,
    inputs: tuple[int, int, int, int],  # addresses of scores, labels, where (0: none), offsets
    sizes: tuple[int, int],  # items, lists
    kind_and_reduction: tuple[int, int],
    settings: Sequence[float],
    seed: int,
    outputs: tuple[int, int],  # addresses of loss, grad
    num_threads: int,
    /,
) -> int: ...
def relevance_feedback(
    isa: int,
    dtype: int,
    queries: int,
    documents: Tensor,  # with the strides of queries and documents
    teacher: int,
    where: int,  # 0: none
    sizes: tuple[int, int, int],  # queries, documents, dimensions
    loss: int,
    learning_rate: float,
    num_steps: int,
    scale: float,  # 0: from the ranges
    num_threads: int,
    /,
) -> None: ...
def candidate_logits(
    isa: int,
    dtype: int,
    hidden: Rows,
    weight: Rows,
    candidates: Rows,
    bias: int,  # 0: none
    sizes: tuple[int, int, int, int],  # rows, vocabulary, hidden size, candidates
    scale: float,
    softcap: float,  # 0: none
    out: int,
    lse: int,  # 0: logits
    num_threads: int,
    /,
) -> int: ...
def lora_shrink(
    isa: int,
    dtype: int,
    factor_dtype: int,
    x: Rows,
    sizes: tuple[int, int, int],  # rows, columns, width of sums and coefficients
    factors: Sequence[Factor],
    sums: Rows,  # address 0: not wanted
    coefficients: Rows,  # address 0: no gradients
    segments: Segments,
    dropout: tuple[int, int],  # threshold (0: none), seed
    num_threads: int,
    /,
) -> int: ...
def lora_expand(
    isa: int,
    dtype: int,
    factor_dtype: int,
    out: Rows,
    sizes: tuple[int, int],  # rows, columns
    factors: Sequence[Factor],
    coefficients: Rows,
    segments: Segments,
    dropout: tuple[int, int],  # threshold (0: none), seed
    num_threads: int,
    /,
) -> int: ...
