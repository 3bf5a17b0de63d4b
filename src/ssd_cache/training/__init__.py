"""Training of learned scores: teacher forcing through soft evictions, so that a score learns which tokens to keep.

It uses the cache's eviction rule and changes no weights of the model.
"""

from ssd_cache.training.learning import learn_score

__all__ = ["learn_score"]
