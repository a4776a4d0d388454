"""What the modules of kernels share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class CompileCase(NamedTuple):
    """One specialisation that tests/test_triton.py compiles ahead of time; every module lists its own.

    Attributes:
        kernel: function under ``triton.jit``.
        signature: type of every argument, ``"constexpr"`` for those in ``constants``.
        constants: value of every compile-time argument; None for a pointer that is left out.
        num_warps: as launched.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int
