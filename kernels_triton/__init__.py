"""Triton kernels of lightning attention; they know nothing of the package that registers them."""
