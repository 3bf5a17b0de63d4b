"""`ssd_attention`: use the attention "ssd" in a model's decoder while blocks that need it are open.

This module only switches the attention; `cache/attention.py` computes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedModel

from ssd_cache._compat import uncompiled
from ssd_cache.cache.attention import NAME
from ssd_cache.decode.patching import Block, Patch, patched


@contextmanager
def ssd_attention(model: PreTrainedModel, name: str = NAME, *, needs_queries: bool = True) -> Iterator[None]:
    """Set the decoder's attention to `name` inside the block; the model's other towers are not changed.

    Args:
        model: a transformers model.
        name: the name of the attention.
        needs_queries: whether the block fails without the queries that the attention receives.

    Raises:
        ValueError: the model has layers whose keys and values an `SSDCache` cannot hold, or queries are needed and its
            decoder has attention code of its own.
        RuntimeError: another thread has set the attention to another name.
    """
    model = uncompiled(model)
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    if others := sorted(kinds - {"full_attention"}):
        raise ValueError(
            f"{type(model).__name__} has layers of kind {', '.join(others)}: SSDCache decides itself what a head still "
            "sees, which such layers do not allow; it is for models whose layers are all of kind full_attention"
        )
    decoder = uncompiled(model.get_decoder())
    with patched(decoder, "_attention_in_force", _AttentionInForce, _AttentionBlock(name=name)):
        if needs_queries and decoder.config._attn_implementation != name:  # transformers only logs a warning
            raise ValueError(
                f"{type(decoder).__name__} has attention code of its own, outside of transformers' AttentionInterface, "
                "so SSDCache receives no queries from it: its heads cannot be profiled, and only a map that needs no "
                "queries works: HeadMap.online(...), or one whose heads are all spatial, with equally many slots"
            )
        yield


@dataclass(eq=False, kw_only=True)
class _AttentionBlock(Block):
    name: str


class _AttentionInForce(Patch):
    """An extra attribute of the decoder that holds its original attention, and those that open blocks need."""

    def __init__(self, decoder: PreTrainedModel, name: str):
        super().__init__(decoder, name)
        self.before = decoder.config._attn_implementation

    def entered(self, owner: _AttentionBlock) -> None:
        for other in self.owners:
            if other.name != owner.name and other.flow is not owner.flow:
                raise RuntimeError(
                    f"another thread or task holds this model's attention at {other.name!r}, and this one asks for "
                    f"{owner.name!r}: do the two one after the other, or give each a model of its own"
                )
        self.target.set_attn_implementation(owner.name)

    def left(self) -> None:
        self.target.set_attn_implementation(self.owners[-1].name if self.owners else self.before)
