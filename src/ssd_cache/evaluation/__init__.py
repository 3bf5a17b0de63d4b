"""How good pictures are that were drawn with a cache policy.

`shapes` is the exact benchmark on the bundled model. How fast a policy is, is `bench`.
"""

from ssd_cache.evaluation.shapes import ShapesScore, score_shapes

__all__ = ["ShapesScore", "score_shapes"]
