"""Faster generation over an `SSDCache`: compiled decode steps, CUDA graphs, and batched guidance.

These modules do not decide which tokens the cache keeps. Their context managers restore the model at the end.
"""

from ssd_cache.decode.fast_decode import fast_decode

__all__ = ["fast_decode"]
