"""Kernels for one decode step: fused attention over slots (Triton, C++) and linear layers on packed weights.

They take plain tensors and know no caches, heads or models. Where a kernel cannot serve, torch's own operators run.
"""
