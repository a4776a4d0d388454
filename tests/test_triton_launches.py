"""What the host code launches, taken by Triton's own launcher as far as its IR, for a GPU that is not here.

Triton compiles anew for every type, and for integers that are 1 or multiples of 16. The interpreter knows nothing of
that, and ahead of time (``test_triton.py``) arguments are as they usually are.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import rankernel
from rankernel import BlockLayout, backends
from rankernel.ops import _checks

triton = pytest.importorskip("triton")
from test_triton import MODULES  # noqa: E402


class Driver:
    """Of a GPU to compile for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that had to be compiled, in order; no result of an op means anything."""
    names: list[str] = []
    function = triton.runtime.jit.JITFunction
    launch = function.run

    def to_ir(self: Any, key: Any, signature: Any, device: int, constexprs: Any, options: Any, *rest: Any) -> str:
        cache, _, target, backend, _ = self.device_caches[device]
        source = self.ASTSource(self, signature, constexprs, rest[0])
        context = triton._C.libtriton.ir.context()
        triton._C.libtriton.ir.load_dialects(context)
        backend.load_dialects(context)
        options = backend.parse_options({**options.__dict__, **source.parse_options()})
        source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
        names.append(self.__name__)
        cache[key] = self.__name__
        return self.__name__

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(function, "_do_compile", to_ir)
    monkeypatch.setattr(function, "run", lambda *args, warmup, **kwargs: launch(*args, warmup=True, **kwargs))
    monkeypatch.setattr(backends, "implementation_for", lambda tensor: "triton")
    monkeypatch.setattr(_checks, "why_no_kernel_of", lambda implementation, tensor: None)
    for name in ("device", "device_of"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    kernels = [entry for module in MODULES for entry in vars(module).values() if isinstance(entry, function)]
    for kernel in kernels:
        kernel.device_caches.clear()
    yield names
    for kernel in kernels:
        kernel.device_caches.clear()


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def attend(
    layout: BlockLayout, heads: tuple[int, int, int], dtype: torch.dtype, sinks: bool = False, **options: Any
) -> None:
    """Attention and scores, forward and backward, of tensors whose strides are those of a wider one."""
    query_heads, kv_heads, size = heads
    kernels = _checks.gpu_kernels("block_attention", "triton")
    query, key, value = (
        zeros(layout.num_tokens, number, size + 1, dtype=dtype)[..., :size]
        for number in (query_heads, kv_heads, kv_heads)
    )
    scale, softcap = options.get("scale", size**-0.5), options.get("softcap")
    rest = (layout.cu_seqlens, layout.list_offsets, zeros(query_heads) if sinks else None, layout.causal, scale)
    rest += (options.get("window"), softcap)
    out, lse = kernels.block_attention(query, key, value, *rest)
    kernels.block_attention_backward(out, lse, out, lse, query, key, value, *rest)
    rows = torch.tensor([layout.num_tokens - 1])
    for function in (rankernel.document_logsumexp, rankernel.token_attention_mass):
        scores = function(query[rows], key, layout, rows, scale=scale, softcap=softcap)
        scores.sum().backward()


def score(num_rows: int, num_candidates: int, shared: bool, size: int = 64, **options: Any) -> None:
    shape = (num_candidates,) if shared else (num_rows, num_candidates)
    candidates = torch.zeros(shape, dtype=torch.long)
    rankernel.candidate_logits(zeros(num_rows, size), zeros(500, size), candidates, **options)


def adapt(num_rows: int, rank: int, size: int = 64, num_segments: int = 0, **options: Any) -> None:
    x, weight, factors = zeros(num_rows, size), zeros(48, size), (zeros(rank, size), zeros(48, rank))
    if num_segments:
        offsets = torch.tensor([0, *sorted(random.choices(range(num_rows + 1), k=num_segments - 1)), num_rows])
        adapters = [(*factors, 0.5)] * 2
        y = rankernel.segment_lora_linear(x, weight, adapters, offsets, torch.arange(num_segments) % 3 - 1)
    else:
        y = rankernel.lora_linear(x, weight, *factors, 2.0, **options)
    y.sum().backward()


def lose(kind: str, lengths: list[int], **options: Any) -> None:
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    scores = zeros(int(offsets[-1]))
    rankernel.listwise_loss(scores, torch.zeros(len(scores)), offsets, kind, **options).backward()


def kinds_covered() -> tuple[str, ...]:
    return _checks.gpu_kernels("listwise_loss", "triton").KINDS_COVERED


ONE = BlockLayout.from_lengths([(0, [], 1)])
SEVERAL = BlockLayout.from_lengths([(3, [5, 0, 16], 1), (1, [1], 0)])
CAUSAL = BlockLayout.from_lengths([(3, [5, 8], 16)], "causal")


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(ONE, torch.float32), (ONE, torch.bfloat16), (SEVERAL, torch.bfloat16), (CAUSAL, torch.float32)],
    ids=["one", "one-bfloat16", "several", "causal"],
)
def test_attention_compiles(compiled: list[str], layout: BlockLayout, dtype: torch.dtype) -> None:
    """Whatever is 1: tokens, segments, heads, window, scale."""
    for heads in ((1, 1, 1), (1, 1, 17), (5, 1, 64), (4, 2, 128)):
        attend(layout, heads, dtype)
        attend(layout, heads, dtype, sinks=True, window=1, softcap=1.0, scale=1.0)
    kernels = {"_plan_kernel", "_forward_kernel", "_delta_kernel", "_grad_query_kernel", "_grad_key_kernel"}
    assert kernels | {"_lse_kernel", "_mass_kernel"} <= set(compiled)
    assert ("_combine_kernel" in compiled) == (layout is not CAUSAL)


def test_scoring_compiles(compiled: list[str]) -> None:
    for rows, candidates, shared, log_probs in itertools.product((1, 16, 200), (1, 100), (True, False), (True, False)):
        score(rows, candidates, shared, size=rows, log_probs=log_probs, softcap=1.0, bias=zeros(500))
    assert {"_dot_kernel", "_matrix_kernel", "_part_kernel", "_combine_kernel"} == set(compiled)


def test_adapters_compile(compiled: list[str]) -> None:
    for rows, rank, size, segments in itertools.product((1, 600), (1, 33), (1, 64), (0, 1, 4)):
        adapt(rows, rank, size, segments)
    adapt(16, 8, dropout_p=0.5, gate=zeros(8))
    assert len(set(compiled)) == 5


def test_losses_compile(compiled: list[str]) -> None:
    for kind in kinds_covered():
        lose(kind, [1])
        lose(kind, [16, 0, 40], where=torch.ones(56, dtype=torch.bool))
    cases = _checks.gpu_kernels("listwise_loss", "triton").COMPILE_CASES
    assert {case.kernel.__name__ for case in cases} == set(compiled)


def layouts() -> BlockLayout:
    lists = [
        (random.randint(1, 60), [random.randint(0, 160) for _ in range(random.randint(1, 60))], random.randint(1, 50))
        for _ in range(random.choice((1, 1, 2, 5)))
    ]
    return BlockLayout.from_lengths(lists)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda: attend(layouts(), (16, 8, 128), torch.bfloat16), id="attention"),
        pytest.param(lambda: score(random.randint(65, 300), random.randint(1, 40), True, log_probs=True), id="scoring"),
        pytest.param(lambda: adapt(random.randint(65, 3000), 16), id="adapter"),
        pytest.param(lambda: adapt(random.randint(65, 3000), 16, num_segments=random.randint(1, 9)), id="adapters"),
        pytest.param(lambda: lose("ranknet", random.choices(range(1, 200), k=random.randint(1, 9))), id="ranknet"),
        pytest.param(lambda: lose("listmle", random.choices(range(1, 200), k=random.randint(1, 9))), id="listmle"),
    ],
)
def test_new_sizes_compile_nothing(compiled: list[str], call: Callable[[], None]) -> None:
    """Nor does a launch warn."""
    random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            call()
        first = len(compiled)
        for _ in range(20):
            call()
    assert compiled[first:] == []
