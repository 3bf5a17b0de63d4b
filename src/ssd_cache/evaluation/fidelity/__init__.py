"""Fidelity to the full cache: how far a compressed cache moves what the model says next, on any model, without a judge.

`measure_fidelity` measures, `draw_fidelity` draws, `write_fidelity` writes both down; `measure_divergence` asks what
each head alone is worth. How good pictures are is the other benchmarks' matter.
"""

from ssd_cache.evaluation.fidelity.divergence import measure_divergence
from ssd_cache.evaluation.fidelity.figure import draw_fidelity
from ssd_cache.evaluation.fidelity.measure import measure_fidelity
from ssd_cache.evaluation.fidelity.report import write_fidelity
from ssd_cache.evaluation.fidelity.result import Fidelity

__all__ = ["Fidelity", "draw_fidelity", "measure_divergence", "measure_fidelity", "write_fidelity"]
