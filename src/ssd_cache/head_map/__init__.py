"""Head maps: the label of each KV head (spatial or semantic), the scores behind the labels, and the map's files.

A map is data. `ssd_cache.cache` decides what a cache keeps for each label.
"""

from ssd_cache.head_map.checks import HeadMapError
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.head_map.learned_score import LearnedScore

__all__ = ["HeadMap", "HeadMapError", "LearnedScore"]
