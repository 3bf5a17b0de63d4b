"""transformers' `generate` with an SSDCache; `model.generate(..., custom_generate="user/ssd-cache")` runs this file.

It reads its own arguments and loads the head map. ssd_cache.enable and the model's own generate do the rest.
"""

from ssd_cache import HeadMap, enable
from ssd_cache.model_grids import layout_of_model

SETTINGS = ("budget", "slots", "buffer", "num_recent", "num_sinks", "score", "kv_dtype")
"""Arguments of `ssd_cache.SSDCache`, which has their defaults."""


def generate(model, head_map=None, grid=None, **kwargs):
    """Run the model's own generate with a fresh SSDCache for this call; returns its result.

    Args:
        model: a causal language model whose layers attend to all earlier tokens.
        head_map: a Hub repository, a folder or a file with the model's head map, or a HeadMap, or "online".
        grid: rows and columns of visual tokens, only for head_map="online". It is required there, unless the model's
            configuration fixes it. A head map contains its grid.
        kwargs: `budget`, `slots`, `buffer`, `num_recent`, `num_sinks`, `score` and `kv_dtype` as for SSDCache;
            all others are passed to generate.

    Raises:
        ValueError: no head map, no grid for head_map="online", a cache passed by the caller, or a setting out of range.
        HeadMapError: a head map that is missing, cannot be trusted, or does not fit the model.
    """
    if head_map is None:
        raise ValueError(
            "no head map: give head_map='user/head-map' (a Hub repository, a folder or a file), or head_map='online', "
            "which needs no map"
        )
    for name in ("cache", "past_key_values"):  # the name since transformers 5.24, and the older one
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} is a {type(kwargs[name]).__name__}, but this generate makes its own SSDCache: leave {name} "
                "out, or leave custom_generate out"
            )
    if head_map == "online":
        config = model.config.get_text_config(decoder=True)
        shape = {"num_layers": config.num_hidden_layers, "num_kv_heads": config.num_key_value_heads}
        head_map = HeadMap.online(**shape).with_layout(layout_of_model(model.config, grid))
    elif not isinstance(head_map, HeadMap):
        head_map = HeadMap.from_pretrained(head_map)
    settings = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
    own = vars(model).pop("generate", None)  # this very function, if the model's repository has this file
    try:
        with enable(model, head_map, **settings):
            return model.generate(**kwargs)
    finally:
        if own is not None:
            model.generate = own
