"""Head maps: which KV head is spatial and which semantic, the scores behind that, and the files they are saved in.

A map is data. What a cache keeps because of it is decided in `ssd_cache.cache`.
"""

from ssd_cache.head_map.checks import HeadMapError
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.head_map.learned_score import LearnedScore

__all__ = ["HeadMap", "HeadMapError", "LearnedScore"]
