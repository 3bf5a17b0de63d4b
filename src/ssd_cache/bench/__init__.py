"""Measure speed and memory of cache policies, compared in one run with the caches of transformers and the roofline.

`run` generates the same images with every cache and returns the measured values as a `Report`. It measures speed;
`evaluation` measures image quality.
"""

from ssd_cache.bench.cases import Case, choose_cases
from ssd_cache.bench.results import Report, Row
from ssd_cache.bench.running import choose_windows, run
from ssd_cache.bench.subject import SHAPES, load_subject

__all__ = ["SHAPES", "Case", "Report", "Row", "choose_cases", "choose_windows", "load_subject", "run"]
