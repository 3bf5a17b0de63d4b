"""A data set of pixel-art shapes: scenes with captions, and a judge that reads objects from images exactly.

shapes-janus, the small trained Janus in `checkpoint/`, generates such images; `ssd_cache.models` loads it. No model is
used here.
"""

from ssd_cache.shapes.judge import FoundObject, Requirement, Verdict, judge, parse_caption, read_objects, to_tokens
from ssd_cache.shapes.scenes import GRID, KINDS, PALETTE, Scene, SceneObject, draw, make_prompts, make_scene

__all__ = [
    "GRID",
    "KINDS",
    "PALETTE",
    "FoundObject",
    "Requirement",
    "Scene",
    "SceneObject",
    "Verdict",
    "draw",
    "judge",
    "make_prompts",
    "make_scene",
    "parse_caption",
    "read_objects",
    "to_tokens",
]
