"""These tests need Triton's interpreter, which is chosen when triton is imported: tests/test_triton.py runs them."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture
def interpreted_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes the bits of bfloat16 for integers in ``tl.dot``, and knows no bf16x6."""
    # This file is read where triton is not installed, too.
    import triton
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        return plain(self, *(wide(handle) for handle in (a, b)), *rest)

    def wide(handle):
        if handle.dtype.scalar != triton.language.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, triton.language.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    options = interpreter.interpreter_builder.options
    allowed = (*options.allowed_dot_input_precisions, "bf16x3", "bf16x6")
    monkeypatch.setattr(
        interpreter.interpreter_builder, "options", dataclasses.replace(options, allowed_dot_input_precisions=allowed)
    )
