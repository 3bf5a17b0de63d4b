"""Training of learned scores: teacher forcing with soft evictions, by which a score learns which tokens to keep.

It uses the cache's eviction rule and does not change the model's weights.
"""

from ssd_cache.training.learning import learn_score

__all__ = ["learn_score"]
