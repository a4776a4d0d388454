"""Checks that the ops share. They run inside the op, on concrete tensors, before any memory is touched."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch

from rankernel import backends
from rankernel.layout import BlockLayout

LIBRARY = torch.library.Library("rankernel", "DEF")
"""Every op of the package is defined in this namespace: ``torch.ops.rankernel``."""

NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The values are those of ``DType`` in csrc/types.h."""

MAX_HEAD_SIZE = 256
BAD_LAYOUT, BAD_ROWS = 1, 2  # Status in csrc/types.h


def check_layout(layout: object, **tensors: torch.Tensor) -> None:
    """Raises TypeError for anything but a BlockLayout, ValueError for tensors without as many rows as it has tokens.

    Kernels on the CPU count again; nothing else would tell on CUDA, which is not waited for. A compiled graph, which
    serves every layout, does without.
    """
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout: expected a BlockLayout, got {type(layout).__name__}")
    if not torch.compiler.is_compiling():
        _check_tokens(layout.num_tokens, {name: tensor for name, tensor in tensors.items() if tensor.dim() == 3})


def check_scale(head_size: int, scale: float | None, softcap: float | None) -> float:
    """The scale to use. Raises ValueError unless scale and softcap are positive and finite."""
    if scale is None:
        scale = head_size**-0.5 if head_size else 1.0
    elif not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive finite number, got {scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a positive finite number or None, got {softcap}")
    return float(scale)


def check_heads(query: torch.Tensor, key: torch.Tensor) -> None:
    """Raises unless query [_, Hq, D] and key [T, Hkv, D] fit together."""
    for name, tensor in (("query", query), ("key", key)):
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions [tokens, heads, head size], got {list(tensor.shape)}")
    check_same("key", key, "query", query)
    if key.shape[2] != query.shape[2]:
        raise ValueError(f"key: expected the head size of query, {query.shape[2]}, got {key.shape[2]}")
    if query.shape[1] == 0 or key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"key: expected a number of heads that divides the {query.shape[1]} of query, got {key.shape[1]}"
        )


def check_same(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raises TypeError for another dtype, ValueError for another device."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {tensor.device}")


def check_device(cu_seqlens: torch.Tensor, tensor: torch.Tensor) -> None:
    """Raises ValueError unless the layout lies where the tensors lie."""
    if tensor.device != cu_seqlens.device:
        raise ValueError(f"layout: expected to be on the device of query, {tensor.device}, got {cu_seqlens.device}")


def check_tokens(cu_seqlens: torch.Tensor, **tensors: torch.Tensor) -> None:
    """Raises ValueError for the first tensor whose length is not the number of packed tokens. Reads cu_seqlens."""
    _check_tokens(int(cu_seqlens[-1]), tensors)


def _check_tokens(num_tokens: int, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.shape[0] != num_tokens:
            raise ValueError(f"{name}: expected {num_tokens} tokens as in the layout, got {tensor.shape[0]}")


def check_status(status: int, rows: torch.Tensor | None = None) -> None:
    """Turns a native status into an exception."""
    if status == BAD_LAYOUT:
        raise ValueError("layout: its cu_seqlens and list_offsets are inconsistent; was it modified after creation?")
    if status == BAD_ROWS:
        raise ValueError(f"rows: expected positions of packed tokens, got {rows}")


def check_candidates(candidates: torch.Tensor, vocabulary: int) -> None:
    """Raises ValueError for token ids outside the vocabulary. Reads candidates."""
    if candidates.numel() and not 0 <= int(candidates.min()) <= int(candidates.max()) < vocabulary:
        raise ValueError(f"candidates: expected token ids in [0, {vocabulary}), got {candidates.tolist()}")


def why_no_kernel(query: torch.Tensor, implementation: str = "cpu") -> str | None:
    """Why an implementation has no kernel for the heads of query, or None; see :func:`why_no_kernel_of`."""
    why_not = why_no_kernel_of(implementation, query)
    if why_not is None and not 0 < query.shape[2] <= MAX_HEAD_SIZE:
        why_not = f"kernels cover head sizes from 1 to {MAX_HEAD_SIZE}, not {query.shape[2]}"
    return why_not


def why_no_kernel_of(implementation: str, tensor: torch.Tensor) -> str | None:
    """Why the kernels of an implementation, ``"cpu"``, ``"triton"`` or ``"cuda"``, do not take a tensor, or None."""
    if tensor.device.type != ("cpu" if implementation == "cpu" else "cuda"):
        return f"there is no kernel for {tensor.device.type} tensors"
    if tensor.dtype not in NATIVE_DTYPES:
        return f"there is no kernel for {tensor.dtype}"
    return None if implementation == "cpu" else backends.why_no_module(implementation)


@functools.cache
def gpu_kernels(op: str, implementation: str) -> Any:
    """The module of an op's kernels on CUDA tensors, imported when they are first wanted."""
    name = "rankernel._C_cuda" if implementation == "cuda" else f"rankernel.triton_kernels.{op}"
    return importlib.import_module(name)


def address(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Address, token stride and head stride as the bindings take them; the last dimension must be contiguous."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dimension is contiguous, else a contiguous copy."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def layout_of(cu_seqlens: torch.Tensor, list_offsets: torch.Tensor, causal: bool) -> BlockLayout:
    """The layout that an op received as tensors, for the references."""
    boundaries, offsets = cu_seqlens.tolist(), list_offsets.tolist()
    lengths = [end - begin for begin, end in itertools.pairwise(boundaries)]
    lists = [lengths[begin:end] for begin, end in itertools.pairwise(offsets)]
    if any(len(segments) < 2 for segments in lists):
        check_status(BAD_LAYOUT)
    packed = [(segments[0], segments[1:-1], segments[-1]) for segments in lists]
    return BlockLayout.from_lengths(packed, "causal" if causal else "block")
