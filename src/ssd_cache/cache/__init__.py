"""`SSDCache` and the attention "ssd": what each KV head keeps of the visual tokens, and how attention reads it.

From `SSDCache` (settings, a list of layers) down to layers, slot stores and the eviction rule.
"""

import ssd_cache._compat
import ssd_cache.cache.attention  # noqa: F401, it registers the attention "ssd"
from ssd_cache.cache.cache import POLICIES, MemoryStats, SSDCache

__all__ = ["POLICIES", "MemoryStats", "SSDCache"]
