"""Which implementations exist for every op, which one runs, and how to force one.

``RANKERNEL_BACKEND`` (``reference``, ``cpu``, ``triton`` or ``cuda``) and ``RANKERNEL_ISA`` (``scalar``, ``avx2``,
``avx512``, ``avx512bf16``, ``amx``) do from outside what ``with use(backend=..., isa=...)`` does from inside. A choice
that cannot run here raises; nothing falls back silently.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from rankernel import _C

OPS = ("block_attention", "candidate_logits", "document_scores", "listwise_loss", "lora_linear", "relevance_feedback")
BACKENDS = ("reference", "cpu", "triton", "cuda")
GPU_KERNELS = {"block_attention": ("triton",)} | dict.fromkeys(
    ("candidate_logits", "document_scores", "listwise_loss", "lora_linear"), ("triton", "cuda")
)
"""Ops with kernels for CUDA tensors, and the backends that have them."""
ISAS: tuple[str, ...] = tuple(_C.isas())
"""Instruction sets this build has kernels for, slowest first."""

_MISSING: dict[str, str] = _C.missing_features()
_COMPUTE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Implementation:
    """One row of :func:`table`."""

    op: str
    name: str
    dtypes: str
    available: bool
    why_not: str


@dataclass(frozen=True)
class _Choice:
    backend: str | None
    isa: str | None


def available_isas() -> list[str]:
    """Instruction sets that this build and this processor can run, slowest first."""
    return [isa for isa in ISAS if not _MISSING[isa]]


def _check_isa(isa: str, source: str) -> str:
    if isa not in ISAS:
        raise ValueError(f"{source}: expected one of {', '.join(ISAS)}, got {isa!r}")
    if _MISSING[isa]:
        raise RuntimeError(f"{source}: {isa} cannot run here, this processor or system lacks {_MISSING[isa]}")
    return isa


def _check_backend(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def _from_environment() -> _Choice:
    backend, isa = os.environ.get("RANKERNEL_BACKEND"), os.environ.get("RANKERNEL_ISA")
    return _Choice(
        _check_backend(backend, "RANKERNEL_BACKEND") if backend else None,
        _check_isa(isa, "RANKERNEL_ISA") if isa else None,
    )


_ENVIRONMENT = _from_environment()
_choice: ContextVar[_Choice] = ContextVar("rankernel_choice", default=_ENVIRONMENT)
_DEFAULT_ISA = next(isa for isa in reversed(ISAS) if not _MISSING[isa] and not isa.endswith("_emulated"))


@contextlib.contextmanager
def use(backend: str | None = None, isa: str | None = None) -> Iterator[None]:
    """Forces a backend, or caps the CPU kernels at an instruction set, for the calls inside.

    Args:
        backend: of :data:`BACKENDS`; one that is forced raises where it has no kernel for the inputs, other than
            ``"reference"``. CUDA tensors go to ``"triton"`` unless ``"cuda"`` is forced.
        isa: the highest instruction set to use; a dtype that has no kernel of that level uses the next lower one.

    Raises:
        ValueError: an unknown name.
        RuntimeError: an instruction set that this processor lacks.
    """
    current = _choice.get()
    chosen = _Choice(
        _check_backend(backend, "backend") if backend else current.backend,
        _check_isa(isa, "isa") if isa else current.isa,
    )
    token = _choice.set(chosen)
    try:
        yield
    finally:
        _choice.reset(token)


def kept() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Enters again what is forced now: PyTorch runs backward passes of CUDA tensors in a thread of its own."""
    choice = _choice.get()
    return functools.partial(use, choice.backend, choice.isa)


def table() -> list[Implementation]:
    """Every op with every implementation: the dtypes it covers, and why it cannot run here if it cannot."""
    rows = []
    for op in OPS:
        rows.append(Implementation(op, "reference", "any", True, ""))
        for isa, dtypes in _C.kernels(op):
            why_not = f"this processor or system lacks {_MISSING[isa]}" if _MISSING[isa] else ""
            rows.append(Implementation(op, isa, ", ".join(dtypes), not why_not, why_not))
        for name in GPU_KERNELS.get(op, ()):
            why_not = why_no_module(name) or ("" if torch.cuda.is_available() else "PyTorch sees no CUDA device")
            rows.append(Implementation(op, name, "float32, bfloat16, float16", not why_not, why_not))
    return rows


def active_isa(op: str, dtype: torch.dtype) -> str:
    """The instruction set whose kernel a call of ``op`` on ``dtype`` CPU tensors runs now, or ``"reference"``."""
    if _choice.get().backend == "reference" or dtype not in _COMPUTE_DTYPES:
        return "reference"
    return _C.selected_isa(op, _COMPUTE_DTYPES[dtype], isa_level())


def isa_level() -> int:
    """Index into :data:`ISAS` of the highest instruction set that calls may use now."""
    return ISAS.index(_choice.get().isa or _DEFAULT_ISA)


_warned: set[str] = set()


def implementation_for(tensor: torch.Tensor) -> str:
    """``"cpu"``, or what runs on CUDA tensors: ``"cuda"``, the C++ extension, where it is forced, else ``"triton"``."""
    if tensor.device.type == "cpu":
        return "cpu"
    return "cuda" if _choice.get().backend == "cuda" else "triton"


def why_no_module(implementation: str) -> str | None:
    """Why the Triton or CUDA kernels cannot be imported, or None. Does not import them."""
    if implementation == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if implementation == "cuda" and importlib.util.find_spec("rankernel._C_cuda") is None:
        return "built without RANKERNEL_CUDA=ON"
    return None


def native_refused(op: str, why_not: str | None, implementation: str = "cpu") -> bool:
    """Whether the call goes to the reference: forced, or because no kernel covers it (warned of once per reason).

    Args:
        op: name of the op.
        why_not: why no native kernel covers these inputs, or None where one does.
        implementation: of :data:`BACKENDS`, the one that would run.

    Raises:
        NotImplementedError: another implementation is forced, or this one is and does not cover these inputs.
    """
    backend = _choice.get().backend
    if backend == "reference":
        return True
    if backend not in (None, implementation):
        why_not = why_not or f"these inputs are for {implementation!r}"
    if why_not is None:
        return False
    if backend is not None:
        raise NotImplementedError(f"{op}: backend {backend!r} is forced, but {why_not}")
    message = f"rankernel.{op}: {why_not}; running the PyTorch reference, which is slow"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)
    return True
