"""`enable`: a fresh `SSDCache` for every picture that a model's `generate` draws, for code that calls generate itself.

A context manager: what it puts on the model (a wrapped `generate`, the attention "ssd" in the decoder) comes off at
the end, also after an exception. It does not touch classes or other models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ssd_cache._compat import CACHE, CACHE_NAMES
from ssd_cache.attention import NAME
from ssd_cache.cache import SSDCache, decoder_shape
from ssd_cache.fast_decode import fast_decode
from ssd_cache.guidance import batched_guidance
from ssd_cache.head_map import HeadMap
from ssd_cache.models.find import family_of
from ssd_cache.sharding import check_agreement, shard_of


@contextmanager
def enable(model: PreTrainedModel, head_map: HeadMap, *, fast: bool = False, **settings) -> Iterator[PreTrainedModel]:
    """Give every `model.generate(...)` inside the block that draws pictures an `SSDCache` of its own.

    - A call for text (Janus or Emu3 asked about a picture) is left as it is, with the model's own cache.
    - Where the call says how large the pictures are (GLM-Image), the map's labels are used for a grid of that size.
    - A call with `guidance_scale` to a model that leaves guidance to transformers (Emu3) is drawn in one batch with
      its unconditional rows, so that they are in the `SSDCache` too; see `batched_guidance`.

    Args:
        model: a transformers model with `generate`: a pipeline's `pipe.model`, `pipe.vision_language_encoder`.
        head_map: the model's head map.
        fast: run the decoder's steps through `fast_decode`, which pays for many pictures.
        settings: as for `SSDCache`: budget, buffer, num_recent, num_sinks, kv_dtype and so on.

    Yields:
        The model. A call that brings its own cache keeps it, and is left as it is.

    Raises:
        TypeError: no transformers model with `generate`, such as a whole pipeline, or one that has an encoder too.
        HeadMapError: the map does not fit the model's configuration, or the processes of a tensor parallel model were
            given unlike maps or settings.
        ValueError: a setting out of range, or layers that attend a sliding window; before anything is generated.

    Example:
        with enable(pipe.model, head_map, budget=0.2):
            pipe(["a photo of a red circle", "a photo of three squares"], generation_mode="image")
    """
    _check_generates(model)
    check_agreement(model, head_map, settings)
    settings = {"shard": shard_of(model), **settings}
    SSDCache(head_map, **settings)  # refuse bad settings now, not in the middle of a pipeline
    head_map.check_fits(type(model).__name__, *decoder_shape(model.config.get_text_config(decoder=True)))
    head_map.check_made_for(model.name_or_path)
    family = family_of(model.config)
    own_generate = vars(model).get("generate")
    generate = model.generate

    def generate_with_cache(*args, **kwargs):
        brought = any(kwargs.get(name) is not None for name in CACHE_NAMES)
        if brought or not family.draws(kwargs):
            return generate(*args, **kwargs)
        grid, previews = family.rasters_of_call(kwargs) or (head_map.grid, head_map.previews)
        kwargs[CACHE] = SSDCache(head_map.with_grid(grid, previews), **settings)
        guidance = nullcontext() if family.own_guidance else _take_guidance(model, kwargs)
        with guidance:
            return generate(*args, **kwargs)

    with ssd_attention(model), fast_decode(model) if fast else nullcontext():
        model.generate = generate_with_cache
        try:
            yield model
        finally:
            if own_generate is None:
                del model.generate
            else:
                model.generate = own_generate


@contextmanager
def ssd_attention(model: PreTrainedModel, name: str = NAME) -> Iterator[None]:
    """Set the decoder's attention to `name` inside the block, by transformers' own switch; other towers keep theirs.

    Raises:
        ValueError: layers whose keys and values a cache of the "ssd" kind can not hold.
    """
    config = model.config.get_text_config(decoder=True)
    _check_layers(type(model).__name__, config)
    key = next((key for key in model.config.sub_configs if getattr(model.config, key, None) is config), None)
    before = config._attn_implementation
    model.set_attn_implementation(name if key is None else {key: name})
    try:
        yield
    finally:
        model.set_attn_implementation(before if key is None else {key: before})


def _take_guidance(model: PreTrainedModel, call: dict[str, Any]) -> AbstractContextManager:
    """Take transformers' guidance out of a call's arguments; what draws the same in one batch."""
    settings = call.get("generation_config") or model.generation_config
    named = {name: call.pop(name, None) for name in ("guidance_scale", *NEGATIVE)}
    scale = getattr(settings, "guidance_scale", None) if named["guidance_scale"] is None else named["guidance_scale"]
    if scale is None or scale == 1:
        return nullcontext()
    beams = call.get("num_beams") or settings.num_beams or 1
    if beams > 1:
        raise ValueError(f"num_beams={beams} with guidance_scale={scale}: draw guided pictures with num_beams=1")
    call["guidance_scale"] = 1.0  # or the model's own settings would guide once more
    return batched_guidance(model, scale, *(named[name] for name in NEGATIVE))


NEGATIVE = ("negative_prompt_ids", "negative_prompt_attention_mask")


def _check_generates(model: Any) -> None:
    """Refuse what has no `generate`, and name the parts of a pipeline that have one."""
    if isinstance(model, PreTrainedModel) and callable(getattr(model, "generate", None)):
        if model.config.is_encoder_decoder:
            raise TypeError(
                f"enable got a {type(model).__name__}, whose prompts go through an encoder: SSDCache holds prompt and "
                "picture in one cache, of a model that is a decoder alone"
            )
        return
    found = f"a {type(model).__name__}"
    parts = getattr(model, "components", None)
    parts = parts if isinstance(parts, Mapping) else {"model": getattr(model, "model", None)}
    able = [name for name, part in parts.items() if isinstance(part, PreTrainedModel) and part.can_generate()]
    if able:
        raise TypeError(
            f"enable got {found}; give its autoregressive model, {' or '.join(f'.{name}' for name in able)}"
        )
    raise TypeError(
        f"enable got {found}, which has no autoregressive part: it needs a transformers model with generate(), and "
        "where a script has its own loop over the decoder, give that loop an SSDCache"
    )


def _check_layers(name: str, config: PreTrainedConfig) -> None:
    """Refuse layers of another kind than full attention, told by transformers' own `layer_types`."""
    others = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if others:
        raise ValueError(
            f"{name} has layers of kind {', '.join(others)}: SSDCache decides itself what a head still sees, which "
            "such layers do not allow; it is for models whose layers are all of kind full_attention"
        )
