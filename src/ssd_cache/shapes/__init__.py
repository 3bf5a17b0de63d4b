"""A data set of pixel-art shapes: scenes with captions, and a judge that reads objects from images exactly.

shapes-janus, the small trained Janus in `checkpoint/`, generates such images; `ssd_cache.models` loads it. No model is
used here.
"""

from ssd_cache.shapes.judge import Verdict, judge
from ssd_cache.shapes.scenes import GRID, KINDS, PALETTE, Scene, make_prompts, make_scene

__all__ = ["GRID", "KINDS", "PALETTE", "Scene", "Verdict", "judge", "make_prompts", "make_scene"]
