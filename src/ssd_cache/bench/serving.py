"""What ran the steps of a case: attention, linear layers, and eager, compiled or recorded steps.

It reads the state that `fast_decode`, `packed_linears` and the cache leave on the model inside `Case.running`, after
steps were generated. Nothing is measured here.
"""

from __future__ import annotations

from transformers import Cache

from ssd_cache.bench.cases import Case
from ssd_cache.bench.subject import Subject
from ssd_cache.cache.cache import SSDCache
from ssd_cache.kernels.packed_linears import COPY


def served_by(subject: Subject, case: Case, cache: Cache) -> tuple[str, bool]:
    """Describe what ran the last steps: "CPU loop, packed linears, compiled".

    Returns:
        The description, and whether the case fell back: whether something that its name promises did not run.
    """
    on_gpu, is_fast, lacks_kernel = subject.model.device.type == "cuda", case.steps == "fast_decode", False
    attention, graph = subject.config._attn_implementation, ""
    is_compiled = "compiled" in case.steps  # a rival that is not compiled fails
    if isinstance(cache, SSDCache):
        served = cache.served_by
        attention, is_compiled = served.attention, served.compiled + served.replayed > 0
        lacks_kernel = (is_fast or on_gpu) and any(
            layer.plan.takes_kernel and not layer.has_kernel for layer in cache.layers
        )
        graph = f"CUDA graph with {served.replayed} replays" if served.replayed else ""
    copies = [getattr(weight, COPY, None) for weight in subject.step_weights()]
    is_packed = any(copy is not None and copy.made_of is not None for copy in copies)
    words = (attention, "packed linears" if is_packed else "", "compiled" if is_compiled else "eager", graph)
    lacks = (
        lacks_kernel,
        "packed" in case.steps and not is_packed,
        is_fast and not is_compiled,
        is_fast and on_gpu and not graph,
    )
    return ", ".join(filter(None, words)), any(lacks)
