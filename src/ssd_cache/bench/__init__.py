"""Speed and memory of cache policies, side by side in one run, against transformers' own caches and the roofline.

`run` draws the same pictures with every cache; what comes out is a `Report` of plain numbers. It says how fast, not how
good: that is `evaluation`.
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
