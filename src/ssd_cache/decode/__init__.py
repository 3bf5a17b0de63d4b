"""Run the decoder's steps over an `SSDCache`: compiled, recorded as a CUDA graph, and with batched guidance.

These modules do not decide which tokens the cache keeps. Everything that they put on a model is removed again.
"""

from ssd_cache.decode.fast_decode import fast_decode

__all__ = ["fast_decode"]
