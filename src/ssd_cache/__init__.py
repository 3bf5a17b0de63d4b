"""ssd-cache: a KV cache of fixed size for autoregressive image generators.

Importing it registers the attention name "ssd" with transformers and changes nothing else.
"""

import ssd_cache._compat  # noqa: F401, it refuses a transformers that is too old or too new
from ssd_cache.allocation import allocate_budgets, fit_heads
from ssd_cache.cache import POLICIES, MemoryStats, SSDCache
from ssd_cache.enable import enable
from ssd_cache.fast_decode import fast_decode
from ssd_cache.head_map import HeadMap, HeadMapError
from ssd_cache.learned_score import LearnedScore
from ssd_cache.learning import learn_score
from ssd_cache.measuring import measure_heads
from ssd_cache.profiling import profile_heads

__version__ = "0.1.0"
__all__ = ["POLICIES", "HeadMap", "HeadMapError", "LearnedScore", "MemoryStats", "SSDCache"]
__all__ += ["allocate_budgets", "enable", "fast_decode", "fit_heads", "learn_score", "measure_heads", "profile_heads"]
