"""`SSDCache`: a transformers `Cache` of fixed size for autoregressive image generators.

A list of `SSDLayer`s and the settings that they were made from. It checks the settings before anything is generated.
The layers store and evict tokens; the head map labels the heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from ssd_cache._compat import CACHE
from ssd_cache.budget import Budget
from ssd_cache.cache.layer import SSDLayer
from ssd_cache.cache.policies import POLICIES, find_policy
from ssd_cache.cache.settings import CacheSettings, choose_slots, default_buffer, default_recent, equal_budget
from ssd_cache.cache.sharding import shard_of
from ssd_cache.cache.slots import StaticSlots
from ssd_cache.head_map.head_map import HeadMap, HeadMapError
from ssd_cache.model_grids import layout_of_model

__all__ = ["POLICIES", "MemoryStats", "SSDCache", "ServedBy", "decoder_shape", "default_buffer"]

CLOSING_TOKENS = 3
"""Tokens after the grid that cause no warning: some models, such as Emu3, end an image with a few."""


@dataclass(frozen=True)
class MemoryStats:
    """Bytes of one cache: K and V, bookkeeping, and K and V of a full cache that has seen the same tokens."""

    key_value: int
    bookkeeping: int
    full_cache: int


@dataclass(frozen=True)
class ServedBy:
    """What ran the steps of one image.

    Attributes:
        attention: "Triton kernel", "CPU loop" or "torch's attention"; several, with commas, where layers differ.
        eager, compiled, replayed: number of visual tokens whose step ran uncompiled, through the compiler's code, and
            as the replay of a CUDA graph.
    """

    attention: str
    eager: int
    compiled: int
    replayed: int

    def __str__(self) -> str:
        kinds = {"eager": self.eager, "compiled": self.compiled, "replayed as a CUDA graph": self.replayed}
        return f"{self.attention}; steps: {', '.join(f'{number} {kind}' for kind, number in kinds.items() if number)}"


class SSDCache(Cache):
    """KV cache that keeps the whole prompt and a budget of visual tokens in every head (SSD, arXiv 2510.18716).

    Spatial heads keep their newest tokens. Semantic heads keep the tokens that received the most attention, or the best
    tokens by another `score`. Pass it to a model whose attention is "ssd":
    `model.generate(**inputs, **cache.as_kwargs())`. One cache serves one batch of images. `reset()` clears it for the
    next batch, of any size and prompt length. The tensors stay in memory, and serve again if rows and padded prompt
    length are the same, so that a compiled step and a CUDA graph stay valid.

    Args:
        head_map: which KV head is spatial and which semantic, and the grid of visual tokens.
        budget: visual tokens that a head may hold at any moment. A float in (0, 1] is a fraction of the grid, an int is
            a number of tokens. Give one number; or one for each kind, `{"spatial": 0.1, "semantic": 0.3}`; or a list
            with an entry for each layer, which is one of these or a list with a number for each KV head.
            Default: the budget that the map was fitted to, or 0.2.
        slots: how one number is shared among the heads. "fitted", the default for a map that carries slots
            (`head_map.slots`), scales these to that number on average: a larger number is shared in proportion; for a
            smaller one the largest heads are cut to a common limit. Each head keeps room for `buffer`, `num_recent` and
            `num_sinks`. "uniform", the default for any other map, gives every head that number. A budget that is a dict
            or a list is used unchanged.
        buffer: eviction interval: the number of tokens evicted at once, when a token arrives and all slots are taken.
            Default: a grid row, or a third of a row with "learned" and "leverage", which need no queries. 1
            evicts at every step.
        num_recent: newest tokens that a semantic head always keeps; a float in [0, 1) is a fraction of its slots.
            Default: a quarter of the slots; none with "learned"; a grid row and four tokens with "leverage".
        num_sinks: first tokens of the image that every head always keeps.
        score: how a semantic head ranks its tokens. "sum": the attention received since a token arrived. "mean": that
            sum divided by the number of queries since. "last": the attention of the last `buffer` queries. "margin":
            the grid's first and last column rank above all other columns. "leverage": the squared distance of the
            token's key from the mean key that the head holds, in units of the keys' variance in that direction.
            "learned": the map's learned score. The last three need no queries: they work with any attention if all
            heads of a layer are of one kind and hold equally many tokens. Default: "learned" if the map carries such a
            score, "leverage" for an online map, else "sum".
        kv_dtype: "int8" or "fp8" stores K and V of visual tokens in 8 bits per number, with a scale for each row, head
            and token, at any budget; the prompt keeps the model's dtype. None stores everything in the model's dtype.
        shard: for a tensor parallel model, the index of this process and the number of processes. The cache then uses
            only the part of map and budget for this process's heads. `enable` and `online` read it from the model.

    Raises:
        ValueError: a setting is out of range, a name is unknown, a budget is too small for `buffer` and the tokens that
            must be kept; "learned" with a map that carries no such score, or slots="fitted" with a map that carries no
            slots.
        HeadMapError: at the first update, if the map does not fit the model.

    Attributes:
        slots: how the slots were chosen: "fitted", "uniform", or "given" for a dict or a list.
        num_compiled, num_replayed: steps of this image that `fast_decode` ran compiled, and as replays.
    """

    def __init__(
        self,
        head_map: HeadMap,
        budget: Budget | None = None,
        *,
        slots: str | None = None,
        buffer: int | None = None,
        num_recent: int | float | None = None,
        num_sinks: int = 0,
        score: str | None = None,
        kv_dtype: str | None = None,
        shard: tuple[int, int] = (0, 1),
    ):
        if not isinstance(head_map, HeadMap):
            raise TypeError(
                f"head_map is a {type(head_map).__name__}, expected a HeadMap: HeadMap.from_pretrained(...) loads one"
            )
        slots = choose_slots(slots, budget, head_map)
        if budget is None:
            budget = equal_budget(head_map) if slots == "uniform" or head_map.budget is None else head_map.budget
        if score is None:
            own = "leverage" if head_map.is_online else "sum"
            score = own if head_map.learned is None else "learned"
        if buffer is None:
            buffer = default_buffer(head_map.layout, score)
        if num_recent is None:
            num_recent = default_recent(head_map.layout, score)
        settings = CacheSettings(head_map, budget, slots, buffer, num_recent, num_sinks, score, kv_dtype, shard)
        super().__init__(layers=[SSDLayer(plan) for plan in settings.plans()])
        self.head_map, self.budget, self.slots, self.shard = head_map, budget, slots, shard
        self.buffer, self.num_recent, self.num_sinks = buffer, num_recent, num_sinks
        self.score, self.kv_dtype = score, kv_dtype
        self.num_compiled = self.num_replayed = 0
        self._static_slots: tuple[int, StaticSlots] | None = None

    def reset(self) -> None:
        """Clear the cache for the next batch of images. Its tensors stay in memory, and serve again if they fit."""
        super().reset()
        self.num_compiled = self.num_replayed = 0

    @classmethod
    def online(
        cls,
        model: PreTrainedModel,
        budget: Budget | None = None,
        *,
        grid: tuple[int, int] | None = None,
        **settings,
    ) -> SSDCache:
        """Make a cache for a model without a head map: every head is semantic, with score="leverage".

        It needs no profiling and no training, and no queries: any attention implementation works.

        Args:
            model: the generator, from whose decoder the numbers of layers and KV heads are read.
            budget: as for `SSDCache`. Default: 0.2.
            grid: rows and columns of the model's visual tokens. Default: read from the configuration of Janus. Required
                for models with several image sizes (Emu3, GLM-Image) and for models of unknown families.
            settings: as for `SSDCache`.

        Raises:
            ValueError: as for `SSDCache`, or no grid was given for a model that does not fix one.
        """
        settings.setdefault("shard", shard_of(model))
        layout = layout_of_model(model.config, grid)
        num_layers, num_kv_heads = decoder_shape(model.config.get_text_config(decoder=True))
        head_map = HeadMap.online(num_layers=num_layers, num_kv_heads=num_kv_heads).with_layout(layout)
        return cls(head_map, budget, **settings)

    @classmethod
    def from_policy(cls, policy: str, head_map: HeadMap, budget: Budget | None = None, **settings) -> SSDCache:
        """Make a cache from a policy's name. Only "ssd", "learned" and "margin" use the map's labels.

        Args:
            policy: one of `POLICIES`: "full" (keep every token), "ssd" (the paper's policy), "learned" (the default
                for a map with a learned score), "online" (as `SSDCache.online`), "h2o", "streaming-llm", "linear"
                (LineAR) or "margin". docs/concepts.md lists their settings, and the differences from the papers.
            head_map: the map; for the other policies only its shape matters.
            budget: as for `SSDCache`. By default, every policy holds as many tokens as the map's own slots, or 0.2 of
                the grid.
            settings: as for `SSDCache`; they take precedence over the policy's own.

        Raises:
            ValueError: an unknown policy, or as for `SSDCache`.
        """
        head_map, budget, own_settings = find_policy(policy).apply(head_map, budget)
        return cls(head_map, budget, **{**own_settings, **settings})

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Store new tokens of one layer; see `SSDLayer.update` for shapes, returns and errors."""
        if layer_idx >= len(self.layers) or key_states.shape[1] != self.layers[layer_idx].num_kv_heads:
            raise HeadMapError(
                f"the head map ({self.head_map.origin}) has {self.head_map.num_layers} layers x "
                f"{self.head_map.num_kv_heads} KV heads, shard={self.shard}, but layer {layer_idx} of the model has "
                f"{key_states.shape[1]} KV heads: use the map that was made for this model; a tensor parallel model "
                "needs enable or shard="
            )
        layer = self.layers[layer_idx]
        states = layer.update(key_states, value_states, *args, **kwargs)
        if layer_idx == 0 and not layer.is_static:
            self._check_progress()
        return states

    def allow_cpu_kernel(self) -> None:
        """Allow a CPU kernel that is not bit-exact where nothing is evicted; `fast_decode` calls this for an image."""
        for layer in self.layers:
            layer.allows_cpu_kernel = True

    @property
    def can_step_statically(self) -> bool:
        """Whether the next token can be a static step: from an image's second visual token on."""
        return all(layer.stores for layer in self.layers)

    @contextmanager
    def static_step(self) -> Iterator[None]:
        """Run the model's forward over one visual token as a static step, after its host-side work.

        On entering, due scores and evictions are computed. Inside the block, `update` and the attention "ssd"
        work on all slots under a mask, and slots are tensors. Shapes and Python numbers are then the same at every
        step, so the forward can be compiled once (`fast_decode` does this).
        """
        number = self.layers[0].num_visual
        if self._static_slots is None or self._static_slots[0] != self.version:
            self._static_slots = self.version, StaticSlots(layer.stores for layer in self.layers)
        static = self._static_slots[1]
        static.fill(number)
        try:
            for layer, slots in zip(self.layers, static.slots, strict=True):
                layer.begin_step(slots)
            self._check_progress()
            yield
        finally:
            for layer in self.layers:
                layer.is_static = False

    @property
    def version(self) -> int:
        """Changes whenever a tensor that a static step uses is replaced; a recorded CUDA graph is then invalid."""
        return sum(layer.version for layer in self.layers)

    def _check_progress(self) -> None:
        """Refuse a map with more layers than the model, and warn once there are more tokens than the grid has cells."""
        num_visual = self.layers[0].num_visual
        if num_visual == 1:
            used = sum(layer.is_initialized for layer in self.layers)
            if used < len(self.layers):
                raise HeadMapError(
                    f"the head map ({self.head_map.origin}) has {len(self.layers)} layers, but the model used {used} "
                    "for its prompt: use the map that was made for this model"
                )
        if num_visual == self.layers[0].plan.num_cells + CLOSING_TOKENS + 1:
            layout = self.head_map.layout
            warnings.warn(
                f"SSDCache is past the {layout.text()} = {layout.num_tokens} visual tokens of its head map's grid "
                "and continues; is the grid right for this model, or the cache used for a second image without "
                "reset()?",
                stacklevel=2,
            )

    def as_kwargs(self) -> dict[str, SSDCache]:
        """This cache as the keyword argument of `generate` and `forward`, for every supported version of transformers.

        The argument is `cache` since transformers 5.24 and `past_key_values` before.

        Example:
            model.generate(**inputs, generation_mode="image", **cache.as_kwargs())
        """
        return {CACHE: self}

    @property
    def num_slots(self) -> list[tuple[int, ...]]:
        """Visual tokens that every KV head may hold, layer by layer; for a shard, only the heads of this process."""
        return [layer.plan.num_slots for layer in self.layers]

    @property
    def mean_slots(self) -> float:
        """Visual tokens that a head may hold, on average over the heads."""
        held = [slots for layer in self.num_slots for slots in layer]
        return sum(held) / len(held)

    @property
    def nbytes(self) -> int:
        """Bytes of K and V held in memory, over all layers; for quantised ones, scales included."""
        return sum(layer.nbytes for layer in self.layers)

    def memory_stats(self) -> MemoryStats:
        """Bytes held now, and bytes of a full cache that has seen the same tokens."""
        return MemoryStats(
            key_value=self.nbytes,
            bookkeeping=sum(layer.bookkeeping_nbytes for layer in self.layers),
            full_cache=sum(layer.full_nbytes for layer in self.layers),
        )

    @property
    def served_by(self) -> ServedBy:
        """What ran the steps of this image, until `reset`; shows whether `fast_decode` or a kernel fell back."""
        eager = self.layers[0].num_visual - self.num_compiled - self.num_replayed
        backends = dict.fromkeys(layer.backend for layer in self.layers)  # each once, in order
        return ServedBy(", ".join(backends), eager, self.num_compiled, self.num_replayed)

    def __repr__(self) -> str:
        kv_dtype = "" if self.kv_dtype is None else f"kv_dtype={self.kv_dtype!r}, "
        return (
            f"SSDCache({self.head_map!r}, budget={self.budget!r}, slots={self.slots!r}, buffer={self.buffer}, "
            f"num_recent={self.num_recent}, num_sinks={self.num_sinks}, score={self.score!r}, {kv_dtype}"
            f"{self.get_seq_length()} tokens seen, {self.nbytes / 2**20:.1f} MiB)"
        )


def decoder_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Numbers of a decoder's layers and of KV heads per layer; by default every query head is a KV head."""
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
