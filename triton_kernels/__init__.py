"""Triton kernels, one module per op, installed as ``rankernel.triton_kernels``. None yet."""
