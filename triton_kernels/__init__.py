"""Triton kernels, one module per op, installed as ``rankernel.triton_kernels``.

A module exports the op's function and ``COMPILE_CASES``, what tests/test_triton.py compiles ahead of time.
"""
