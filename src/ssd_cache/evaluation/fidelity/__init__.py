"""Fidelity to the full cache: how much a compressed cache changes the next-token distribution, on any model.

`measure_fidelity` measures it, `draw_fidelity` plots it, `write_fidelity` writes both to files. `measure_divergence`
measures the effect of each head alone. No judge is needed; image quality is measured by the other benchmarks.
"""

from ssd_cache.evaluation.fidelity.divergence import measure_divergence
from ssd_cache.evaluation.fidelity.measure import measure_fidelity
from ssd_cache.evaluation.fidelity.report import draw_fidelity, write_fidelity
from ssd_cache.evaluation.fidelity.result import Fidelity

__all__ = ["Fidelity", "draw_fidelity", "measure_divergence", "measure_fidelity", "write_fidelity"]
