"""ssd-cache: a KV cache of fixed size for autoregressive image generators.
Importing it registers the attention "ssd" with transformers and changes nothing else; some names load at first use."""

from importlib import import_module as _import
from typing import TYPE_CHECKING

from ssd_cache.cache import POLICIES, MemoryStats, ServedBy, SSDCache
from ssd_cache.head_map import HeadMap, HeadMapError, LearnedScore

if TYPE_CHECKING:
    from ssd_cache.decode import fast_decode
    from ssd_cache.enabling import enable
    from ssd_cache.preparing import prepare
    from ssd_cache.profiling import fit_heads, measure_heads, profile_heads
    from ssd_cache.training import learn_score

__version__, _LATER = "0.2.0", {"enable": "enabling", "fast_decode": "decode"}
_LATER |= {"learn_score": "training", "prepare": "preparing"}
__all__ = ["POLICIES", "HeadMap", "HeadMapError", "LearnedScore", "MemoryStats", "SSDCache", "ServedBy"]
__all__ += ["enable", "fast_decode", "fit_heads", "learn_score", "measure_heads", "prepare", "profile_heads"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'ssd_cache' has no attribute {name!r}")
    return getattr(_import(f"ssd_cache.{_LATER.get(name, 'profiling')}"), name)
