"""Triton kernels of attention and its decoding steps; they know nothing of what registers them."""
