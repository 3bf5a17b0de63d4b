"""Kernels for one decode step: fused attention over slots (Triton, C++) and linear layers on packed weights.

They take plain tensors and do not depend on caches or models. Where a kernel is unavailable, torch's operators run.
"""
