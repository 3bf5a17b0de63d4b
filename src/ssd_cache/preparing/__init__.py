"""Preparation of a model: from its weights to a head map with slots, a learned score and a measured fidelity curve.

`prepare` runs the functions of `profiling`, `training` and `evaluation` in order, as one run that resumes.
"""

from ssd_cache.preparing.preparing import prepare

__all__ = ["prepare"]
