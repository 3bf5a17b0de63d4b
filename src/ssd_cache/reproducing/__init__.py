"""Reproduction of the paper's tables: quality, throughput and memory of policies, as one run that resumes.

It runs functions of `evaluation` and `bench` in order, and ends with our numbers beside the paper's.
"""

from ssd_cache.reproducing.reproducing import claim, reproduce

__all__ = ["claim", "reproduce"]
