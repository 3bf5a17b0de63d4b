"""`enable`: a fresh `SSDCache` for every `generate` call of a model, for code that calls generate itself.

A context manager: what it puts on the model (a wrapped `generate`, the attention "ssd" in the decoder) comes off at
the end, also after an exception. It does not touch classes or other models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from ssd_cache.attention import NAME
from ssd_cache.cache import SSDCache
from ssd_cache.head_map import HeadMap
from ssd_cache.sharding import check_agreement, shard_of


@contextmanager
def enable(model: PreTrainedModel, head_map: HeadMap, **settings) -> Iterator[PreTrainedModel]:
    """Give every `model.generate(...)` inside the block an `SSDCache` of its own.

    Args:
        model: a transformers model with `generate`; a pipeline's `pipe.model` works the same.
        head_map: the model's head map.
        settings: as for `SSDCache`: budget, buffer, num_recent, num_sinks.

    Yields:
        The model. A call that brings its own `past_key_values` keeps it.

    Raises:
        HeadMapError: the map does not fit the model's configuration, or the processes of a tensor parallel model were
            given unlike maps or settings.
        ValueError: a setting out of range, before anything is generated.

    Example:
        with enable(pipe.model, head_map, budget=0.2):
            pipe(["a photo of a red circle", "a photo of three squares"], generation_mode="image")
    """
    check_agreement(model, head_map, settings)
    settings = {"shard": shard_of(model), **settings}
    SSDCache(head_map, **settings)  # refuse bad settings now, not in the middle of a pipeline
    config = model.config.get_text_config(decoder=True)
    head_map.check_fits(type(model).__name__, config.num_hidden_layers, config.num_key_value_heads)
    own_generate = vars(model).get("generate")
    generate = model.generate

    def generate_with_cache(*args, **kwargs):
        if kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = SSDCache(head_map, **settings)
        return generate(*args, **kwargs)

    with ssd_attention(model):
        model.generate = generate_with_cache
        try:
            yield model
        finally:
            if own_generate is None:
                del model.generate
            else:
                model.generate = own_generate


@contextmanager
def ssd_attention(model: PreTrainedModel) -> Iterator[None]:
    """Set the decoder's attention to "ssd" inside the block, through transformers' own switch; other towers keep it."""
    config = model.config.get_text_config(decoder=True)
    key = next((key for key in model.config.sub_configs if getattr(model.config, key, None) is config), None)
    before = config._attn_implementation
    model.set_attn_implementation(NAME if key is None else {key: NAME})
    try:
        yield
    finally:
        model.set_attn_implementation(before if key is None else {key: before})
