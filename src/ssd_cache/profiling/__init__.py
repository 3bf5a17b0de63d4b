"""Profiling: generate images with a full cache, measure where each head attends, then label heads and allocate slots.

The results are head maps. The full cache keeps every token; evictions are only simulated.
"""

from ssd_cache.profiling.allocation import fit_heads
from ssd_cache.profiling.measuring import measure_heads
from ssd_cache.profiling.profiling import profile_heads

__all__ = ["fit_heads", "measure_heads", "profile_heads"]
