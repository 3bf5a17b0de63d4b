"""`SSDCache` and the attention "ssd": which visual tokens each KV head keeps, and attention over them.

Contains `SSDCache` (settings, a list of layers), the layers, their slot stores and the eviction rule.
"""

import ssd_cache._compat
import ssd_cache.cache.attention  # noqa: F401, it registers the attention "ssd"
from ssd_cache.cache.cache import POLICIES, MemoryStats, ServedBy, SSDCache

__all__ = ["POLICIES", "MemoryStats", "SSDCache", "ServedBy"]
