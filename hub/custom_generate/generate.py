"""transformers' `generate` with an SSDCache: what `model.generate(..., custom_generate="user/ssd-cache")` runs.

It reads its own arguments, loads the head map, and leaves the rest to ssd_cache.enable and to the model's own generate.
"""

from ssd_cache import HeadMap, enable
from ssd_cache.model_grids import grids_of_model

SETTINGS = ("budget", "slots", "buffer", "num_recent", "num_sinks", "score", "kv_dtype")
"""Arguments of `ssd_cache.SSDCache`, which has their defaults."""


def generate(model, head_map=None, grid=None, **kwargs):
    """The model's own generate, with a fresh SSDCache for this call; returns what that returns.

    Args:
        model: a causal language model whose layers attend to all tokens before.
        head_map: a Hub repository, a folder or a file with the model's head map, or a HeadMap, or "online".
        grid: rows and columns of visual tokens, for head_map="online" alone; needed there, unless the model's
            configuration fixes it. A map knows its own.
        kwargs: `budget`, `slots`, `buffer`, `num_recent`, `num_sinks`, `score` and `kv_dtype` as for SSDCache;
            all else is generate's.

    Raises:
        ValueError: no head map, no grid for head_map="online", a cache of the caller's own, or a setting out of range.
        HeadMapError: a map that is not there, can not be trusted, or does not fit the model.
    """
    if head_map is None:
        raise ValueError(
            "no head map: give head_map='user/head-map' (a Hub repository, a folder or a file), or head_map='online' "
            "to let the cache label the heads while it draws"
        )
    for name in ("cache", "past_key_values"):  # the name since transformers 5.24, and the one before
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} is a {type(kwargs[name]).__name__}, but this generate makes its own SSDCache: leave {name} "
                "out, or leave custom_generate out"
            )
    if head_map == "online":
        config = model.config.get_text_config(decoder=True)
        shape = {"num_layers": config.num_hidden_layers, "num_kv_heads": config.num_key_value_heads}
        head_map = HeadMap.online(**shape).with_grid(*grids_of_model(model.config, grid))
    elif not isinstance(head_map, HeadMap):
        head_map = HeadMap.from_pretrained(head_map)
    settings = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
    own = vars(model).pop("generate", None)  # of a model from a repository with this file it is this function
    try:
        with enable(model, head_map, **settings):
            return model.generate(**kwargs)
    finally:
        if own is not None:
            model.generate = own
