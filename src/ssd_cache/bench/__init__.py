"""Speed and memory of cache policies, compared in one run with transformers' own caches and the roofline.

`run` generates the same images with every cache and returns a `Report` of plain numbers. It measures speed, not image
quality; `evaluation` measures quality.
"""

from ssd_cache.bench.cases import Case, choose, default_cases, product_cases, rivals
from ssd_cache.bench.results import Report, Row
from ssd_cache.bench.run import Plan, run
from ssd_cache.bench.shapes import SHAPES
from ssd_cache.bench.stretches import choose_stretches
from ssd_cache.bench.subject import load_subject

__all__ = [
    "SHAPES",
    "Case",
    "Plan",
    "Report",
    "Row",
    "choose",
    "choose_stretches",
    "default_cases",
    "load_subject",
    "product_cases",
    "rivals",
    "run",
]
