"""Speed and memory of cache policies, side by side in one run and as ratios.

`throughput` draws the same pictures with every policy. It says how fast, not how good: that is `evaluation`.
"""

from ssd_cache.bench.throughput import SHAPES, Case, Measurement, default_cases, measure, random_janus

__all__ = ["SHAPES", "Case", "Measurement", "default_cases", "measure", "random_janus"]
