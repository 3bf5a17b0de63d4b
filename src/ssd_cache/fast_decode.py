"""`fast_decode`: inside the block, a model's one-token steps over an `SSDCache` are compiled, on a GPU recorded too.

The standard `generate` stays as it is. What changes Python's numbers (counting, scoring, evicting) is done before the
compiled call, so its graph is made once and serves every step of a picture. The prompt, other caches, and steps that
ask for hidden states run as ever. Measured on the CPU alone, not on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ssd_cache._compat import CACHE, take_cache
from ssd_cache.attention import NAME
from ssd_cache.cache import SSDCache
from ssd_cache.cuda_graph import RecordedStep
from ssd_cache.packed_linears import packed_linears

DROPPED = {"use_cache", "guidance_scale"}
"""Arguments that a compiled step is not given: it always uses the cache, and Janus's decoder ignores its guidance."""


@contextmanager
def fast_decode(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Compile the steps of a model's decoder that go over an `SSDCache` inside the block.

    The first visual token of a picture runs as ever, the second waits for the compiler (17 s for eight layers on two
    cores, less once it has done so before), all others are fast. Another batch size or length of prompt compiles once
    more; from then on sizes are left open. On a GPU the fourth token of each picture is recorded as a CUDA graph, which
    runs the rest.

    On a CPU pictures whose prompt comes inside the block are drawn by the loops of `cpu_kernels`, in float32 and
    bfloat16, which hold no queries. In float32 the linear layers that steps use run on packed weights, for which a copy
    of them is held.

    Args:
        model: a transformers model with `generate` and the attention "ssd".

    Yields:
        The model. Its decoder's `forward` is the old one after the block, also after an exception.

    Warns:
        UserWarning: once, where `torch.compile` (no C++ compiler, say) or a CUDA graph can not be used; drawing goes on
            without.

    Example:
        with fast_decode(model):
            model.generate(**inputs, generation_mode="image", past_key_values=SSDCache(head_map, budget=0.2))
    """
    decoder = model.get_decoder()
    own = vars(decoder).get("forward")
    decoder.forward = _FastForward(decoder.forward, decoder.config)
    try:
        with packed_linears(model):
            yield model
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own


class _FastForward:
    """A decoder's forward that sends the steps it can to a compiled copy."""

    def __init__(self, eager, config):
        self.eager, self.config = eager, config
        self.compiled = torch.compile(eager, fullgraph=True)
        self.is_usable = True
        self.recorded: RecordedStep | None = RecordedStep()

    def __call__(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):
        cache = take_cache(kwargs)
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        new = inputs_embeds if input_ids is None else input_ids
        if not self._is_step(new, cache, kwargs):
            if isinstance(cache, SSDCache):
                cache.be_fast()
            return self.eager(
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: cache},
                **inputs,
                **kwargs,
            )
        if position_ids is None:
            position_ids = torch.full((1, 1), cache.get_seq_length(), device=new.device)
        # A mask of four dimensions is taken as it is, so no other is made; "ssd" reads none once the prompt is in.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=new.device)
        arguments = {
            **inputs,
            "attention_mask": mask,
            "position_ids": position_ids,
            CACHE: cache,
            "use_cache": True,
        }
        with cache.counted_step():
            if self.recorded is not None and new.device.type == "cuda":
                try:
                    return self.recorded(self._run, cache, arguments)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    self.recorded = None
                    _warn("without CUDA graphs", error)
            return self._run(**arguments)

    def _run(self, **arguments):
        if self.is_usable:
            try:
                return self.compiled(**arguments)
            except torch.OutOfMemoryError:
                raise  # it may come in mid-step, and the compiler is not to blame
            except Exception as error:
                self.is_usable = False
                _warn("uncompiled", error)
        return self.eager(**arguments)  # the compiler failed before anything ran

    def _is_step(self, new: torch.Tensor | None, cache, kwargs: dict) -> bool:
        return (
            isinstance(cache, SSDCache)
            and self.config._attn_implementation == NAME
            and new is not None
            and new.shape[1] == 1
            and cache.can_count_step
            and cache.layers[0].num_rows == new.shape[0]  # else the eager forward says what is wrong
            and not torch.is_grad_enabled()
            # compiled, a step keeps in float32 what autocast rounds, and tokens would not be the eager ones
            and not (new.device.type == "cpu" and torch.is_autocast_enabled("cpu"))
            and all(value is None or value is False for name, value in kwargs.items() if name not in DROPPED)
        )


def _warn(how: str, error: Exception) -> None:
    """What the compiler and the driver raise has no class in common; the first lines of it say who, and then why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines[:2]) or type(error).__name__
    warnings.warn(f"fast_decode goes on {how}: {reason}", stacklevel=4)
