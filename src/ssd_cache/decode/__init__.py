"""Ways to run the decoder's steps over an `SSDCache`: compiled, recorded as a CUDA graph, and with batched guidance.

What the cache keeps is not decided here. Everything that is put on a model comes off again.
"""

from ssd_cache.decode.fast_decode import fast_decode

__all__ = ["fast_decode"]
