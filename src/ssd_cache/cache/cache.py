"""`SSDCache`: a transformers `Cache` of fixed size for autoregressive image generators.

A list of `SSDLayer`s and the settings that they were made from. It checks the settings before anything is generated.
The layers store and evict tokens; the head map labels the heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from ssd_cache._compat import CACHE
from ssd_cache.budget import Budget, check_count, is_amount, resolve_budget, resolve_recent
from ssd_cache.cache.layer import LayerPlan, SSDLayer
from ssd_cache.cache.presets import POLICIES, choose_slots, equal_budget, fitted_slots, preset
from ssd_cache.cache.quantized import KV_DTYPES
from ssd_cache.cache.retention import SCORES
from ssd_cache.cache.sharding import is_distributed, own_heads, shard_of
from ssd_cache.cache.slots import normal_tensors
from ssd_cache.head_map.head_map import HeadMap, HeadMapError
from ssd_cache.layout import ImageLayout
from ssd_cache.model_grids import layout_of_model

__all__ = ["POLICIES", "MemoryStats", "SSDCache", "decoder_shape", "default_buffer"]

DEFAULT_RECENT = 0.25
"""Fraction of a semantic head's slots that keeps the newest tokens, whatever their score; see docs/results.md."""

CLOSING_TOKENS = 3
"""Tokens after the grid that cause no warning: some models, such as Emu3, end an image with a few."""


@dataclass(frozen=True)
class MemoryStats:
    """Bytes of one cache: K and V, bookkeeping, and K and V of a full cache that has seen the same tokens."""

    key_value: int
    bookkeeping: int
    full_cache: int


class SSDCache(Cache):
    """KV cache that keeps the whole prompt and a budget of visual tokens in every head (SSD, arXiv 2510.18716).

    Spatial heads keep their newest tokens. Semantic heads keep the tokens that received the most attention, or the best
    tokens by another `score`. Pass it to a model whose attention is "ssd":
    `model.generate(**inputs, **cache.as_kwargs())`. One cache serves one batch of images.

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
            Default: a grid row, or a third of a row with a learned score, which is cheap to compute. 1 evicts at every
            step.
        num_recent: newest tokens that a semantic head always keeps; a float in [0, 1) is a fraction of its slots.
            Default: a quarter of the slots, or none with a learned score.
        num_sinks: first tokens of the image that every head always keeps.
        score: how a semantic head ranks its tokens. "sum": the attention received since a token arrived. "mean": that
            sum divided by the number of queries since. "last": the attention of the last `buffer` queries. "margin":
            the grid's first and last column rank above all other columns. "learned": the map's learned score. The last
            two need no queries: they work with any attention if all heads of a layer are of one kind and hold equally
            many tokens. Default: "learned" if the map carries such a score, else "sum".
        kv_dtype: "int8" or "fp8" stores K and V of visual tokens in 8 bits per number, with a scale for each row, head
            and token, at any budget; the prompt keeps the model's dtype. None stores everything in the model's dtype.
        shard: for a tensor parallel model, the index of this process and the number of processes. The cache then uses
            only the part of map and budget for this process's heads. `enable` and `online` read it from the model.

    Raises:
        ValueError: a setting is out of range, a name is unknown, a budget is too small for `buffer` and the tokens that
            must be kept; "margin" with an online map, "learned" with a map that carries no such score, or
            slots="fitted" with a map that carries no slots.
        HeadMapError: at the first update, if the map does not fit the model.

    Attributes:
        slots: how the slots were chosen: "fitted", "uniform", or "given" for a dict or a list.
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
        self.slots = choose_slots(slots, budget, head_map)
        if budget is None:
            own = None if self.slots == "uniform" else head_map.budget
            budget = equal_budget(head_map) if own is None else own
        self.head_map, self.budget, self.shard = head_map, budget, shard
        if score is None:
            score = "sum" if head_map.learned is None else "learned"
        self.score, self.kv_dtype = _check_score(score, head_map), _check_kv_dtype(kv_dtype)
        if buffer is None:
            buffer = default_buffer(head_map.layout, score)
        if num_recent is None:
            num_recent = 0 if score == "learned" else DEFAULT_RECENT
        self.buffer = check_count("buffer", buffer, 1)
        self.num_recent, self.num_sinks = num_recent, check_count("num_sinks", num_sinks, 0)
        self._warned = self._is_counted = False
        self._steps: dict[torch.device, torch.Tensor] = {}  # by device: number of the static step's token
        labels = head_map.is_spatial.tolist()
        cells = head_map.num_visual_tokens
        if self.slots == "fitted" and is_amount(budget):
            budget = fitted_slots(head_map, budget, self.buffer, num_recent, self.num_sinks)
        num_slots = resolve_budget(budget, labels, cells)
        if head_map.is_online:
            _check_online(budget, head_map, num_slots)
        plans = [
            LayerPlan(
                layer_idx=index,
                is_spatial=tuple(labels[index]),
                num_slots=num_slots[index],
                num_cells=cells,
                buffer=self.buffer,
                num_recent=tuple(resolve_recent(num_recent, held) for held in num_slots[index]),
                num_sinks=self.num_sinks,
                is_online=head_map.is_online,
                score=score,
                columns=head_map.layout.widest,
                learned=head_map.learned.at(index) if score == "learned" and head_map.learned else None,
                kv_dtype=kv_dtype,
            )
            for index in range(head_map.num_layers)
        ]
        _check_plans(plans, head_map.layout.widest)
        plans = [_part(plan, own_heads(head_map, shard)) for plan in plans]
        super().__init__(layers=[SSDLayer(plan) for plan in plans])

    @classmethod
    def online(
        cls,
        model: PreTrainedModel,
        budget: Budget | None = None,
        *,
        grid: tuple[int, int] | None = None,
        **settings,
    ) -> SSDCache:
        """Make a cache for a model without a head map; it labels the heads from the first grid rows of each batch.

        Args:
            model: the generator, from whose decoder the numbers of layers and KV heads are read.
            budget: as for `SSDCache`, but the same for both kinds. Default: 0.2.
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
    def from_policy(
        cls, policy: str, head_map: HeadMap, budget: Budget | None = None, *, buffer: int | None = None, **settings
    ) -> SSDCache:
        """Make a cache from a policy's name. Only "ssd", "learned" and "margin" use the map's labels.

        - "full": keep every token, whatever the budget.
        - "ssd": the paper's policy: the map's labels, equal slots, tokens ranked by the sum of attention.
          `slots="fitted"` uses the map's slots instead.
        - "learned": the map's labels and slots (equal slots if it carries none), tokens ranked by its learned score.
          `SSDCache(head_map)` does the same with such a map.
        - "h2o": every head semantic, half of its slots for the newest tokens (Zhang et al., arXiv 2306.14048).
        - "streaming-llm": every head spatial, with 4 sinks (Xiao et al., arXiv 2309.17453). The whole prompt is kept
          here too, so the sinks are the first visual tokens.
        - "linear": every head semantic, with score="last": at the end of an image row, drop the tokens that its
          queries attended to least; keep the first tokens and the most recent rows (LineAR, arXiv 2512.04857). Their
          numbers are not public: 4 tokens and one row are our choice. The whole prompt is kept here too.
        - "margin": the map's labels, equal slots, and score="margin": semantic heads keep the margin columns by
          position only.

        Without a budget, every policy holds as many tokens as the map's own slots, or 0.2 of the grid.

        Raises:
            ValueError: an unknown policy, or as for `SSDCache`.
        """
        head_map, budget, preset_settings = preset(policy, head_map, budget)
        return cls(head_map, budget, buffer=buffer, **{**preset_settings, **settings})

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Store new tokens of one layer; see `SSDLayer.update` for shapes, returns and errors."""
        if layer_idx >= len(self.layers) or key_states.shape[1] != len(self.layers[layer_idx].plan.is_spatial):
            raise self._misfit(layer_idx, key_states.shape[1])
        states = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        if layer_idx == 0 and not self._is_counted:
            self._check_progress()
        return states

    def _misfit(self, layer_idx: int, num_heads: int) -> HeadMapError:
        """The error for a layer that is missing in the map or has another number of heads."""
        expected = self.head_map.num_kv_heads
        part = "" if self.shard[1] == 1 else f", of which process {self.shard[0]} of {self.shard[1]} holds its part"
        remedy = "use the map that was made for this model"
        if is_distributed() and self.shard[1] == 1 and expected % num_heads == 0:
            remedy = (
                f"if the model is tensor parallel over {expected // num_heads} processes, use enable or give shard="
            )
        return HeadMapError(
            f"the head map ({self.head_map.origin}) has {self.head_map.num_layers} layers x {expected} KV heads{part}, "
            f"but layer {layer_idx} of the model has {num_heads} KV heads: {remedy}"
        )

    def be_fast(self) -> None:
        """Allow CPU kernels that are not bit-exact for the next image; `fast_decode` calls this."""
        for layer in self.layers:
            layer.is_fast = True

    @property
    def can_count_step(self) -> bool:
        """Whether the next token can be a static step (`counted_step`): from an image's second visual token on."""
        return all(layer.can_begin_step for layer in self.layers)

    @contextmanager
    def counted_step(self) -> Iterator[None]:
        """Run the model's forward over one visual token as a static step, after its host-side work.

        On entering, due scores, labels and evictions are computed. Inside the block, `update` and the attention "ssd"
        work on all slots under a mask and compute slot indices from one tensor. Shapes and Python numbers are then the
        same at every step, so the forward can be compiled once (`fast_decode` does this).
        """
        # reuse the same tensors at every step; fill them, since a copy from the host waits for the device
        for device in {layer.device for layer in self.layers}:
            if device not in self._steps:
                with normal_tensors():
                    self._steps[device] = torch.zeros((), dtype=torch.int64, device=device)
            self._steps[device].fill_(self.layers[0].num_visual)
        for layer in self.layers:
            layer.begin_step(self._steps[layer.device])
        self._is_counted = True
        self._check_progress()
        try:
            yield
        finally:
            self._is_counted = False
            for layer in self.layers:
                layer.end_step()

    @property
    def places(self) -> tuple[int, ...]:
        """Addresses of all tensors that a static step uses; a recorded CUDA graph is valid while they stay the same."""
        return tuple(tensor.data_ptr() for layer in self.layers for tensor in layer.tensors())

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
        if num_visual > self.head_map.num_visual_tokens + CLOSING_TOKENS and not self._warned:
            self._warned = True
            layout = self.head_map.layout
            warnings.warn(
                f"SSDCache is past the {layout.text()} = {layout.num_tokens} visual tokens of its head map's grid "
                "and goes on; is the grid right for this model, or the cache used for a second picture without "
                "reset()?",
                stacklevel=2,
            )

    def reset(self) -> None:
        """Clear the cache for the next image, which may have any batch size and prompt length."""
        super().reset()
        self._warned = False

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
    def labels(self) -> HeadMap | None:
        """The labels in use: the map's, or those that an online cache found for this batch (None until then).

        In a tensor parallel model, an online cache labels only the heads of its own process.
        """
        if not self.head_map.is_online:
            return self.head_map
        labels = [layer.labels for layer in self.layers]
        if None in labels:
            return None
        return HeadMap(torch.tensor(labels), method="found online").with_layout(self.head_map.layout)

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

    def __repr__(self) -> str:
        kv_dtype = "" if self.kv_dtype is None else f"kv_dtype={self.kv_dtype!r}, "
        return (
            f"SSDCache({self.head_map!r}, budget={self.budget!r}, slots={self.slots!r}, buffer={self.buffer}, "
            f"num_recent={self.num_recent}, num_sinks={self.num_sinks}, score={self.score!r}, {kv_dtype}"
            f"{self.get_seq_length()} tokens seen, {self.nbytes / 2**20:.1f} MiB)"
        )


def default_buffer(layout: ImageLayout, score: str) -> int:
    """Default eviction interval: a row for a score computed from queries, a third of a row for a learned score."""
    columns = layout.grid[1]
    return max(1, columns // 3) if score == "learned" else columns


def decoder_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Numbers of a decoder's layers and of KV heads per layer; by default every query head is a KV head."""
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _check_score(score: str, head_map: HeadMap) -> str:
    if score not in SCORES:
        near = get_close_matches(str(score), SCORES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"score={score!r} is unknown: {hint}give one of {', '.join(map(repr, SCORES))}")
    if score == "learned" and head_map.learned is None:
        raise ValueError(
            f"score='learned': the head map ({head_map.origin}) carries no learned score; `ssd-cache learn` makes a "
            "map with one, or give score='sum', 'mean' or 'last'"
        )
    if score == "margin" and head_map.is_online:
        raise ValueError(
            "score='margin' looks at no attention, by which an online map labels its heads: give a map with labels, or "
            "score='sum', 'mean' or 'last'"
        )
    if score == "margin" and head_map.layout.draft_grids:
        raise ValueError(
            "score='margin' goes by the columns of a single grid, but this head map has previews of other widths: give "
            "score='sum', 'mean' or 'last'"
        )
    return score


def _check_kv_dtype(kv_dtype: str | None) -> str | None:
    if kv_dtype is None or (isinstance(kv_dtype, str) and kv_dtype in KV_DTYPES):
        return kv_dtype
    near = get_close_matches(str(kv_dtype), KV_DTYPES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"kv_dtype={kv_dtype!r} is unknown: {hint}give one of {', '.join(map(repr, KV_DTYPES))}, or None to store "
        "visual tokens in the model's dtype"
    )


def _check_online(budget: Budget, head_map: HeadMap, slots: list[tuple[int, ...]]) -> None:
    """Refuse budgets by kind or by head for an online map, whose heads have no kind yet."""
    swapped = resolve_budget(budget, (~head_map.is_spatial).tolist(), head_map.num_visual_tokens)
    if swapped != slots or any(len(set(layer)) > 1 for layer in slots):
        raise ValueError(
            f"budget={budget!r} gives heads of one layer different numbers of slots: an online map does not know yet "
            "which head is which, so give one number, or a list with one for each layer"
        )


def _part(plan: LayerPlan, heads: slice) -> LayerPlan:
    """The plan for some of a layer's heads."""
    return replace(
        plan,
        is_spatial=plan.is_spatial[heads],
        num_slots=plan.num_slots[heads],
        num_recent=plan.num_recent[heads],
        learned=None if plan.learned is None else plan.learned.at(heads),
    )


def _check_plans(plans: list[LayerPlan], columns: int) -> None:
    """Refuse budgets too small for the tokens that must be kept; warn if a window misses the token right above."""
    short = None
    for plan in plans:
        for kind, num_slots, num_recent in sorted(set(zip(plan.kinds, plan.num_slots, plan.num_recent, strict=True))):
            if num_slots >= plan.num_cells:
                continue  # nothing is evicted within an image
            room = {"buffer": plan.buffer, "num_recent": num_recent, "num_sinks": plan.num_sinks}
            if kind == "spatial":
                del room["num_recent"]
            if num_slots < sum(room.values()):
                asked = [f"{name}={value}" for name, value in room.items() if value]
                raise ValueError(
                    f"the budget gives a {kind} head of layer {plan.layer_idx} {num_slots} slots, fewer than "
                    f"{' and '.join(asked)} together: raise the budget, or lower "
                    f"{' or '.join(name for name, value in room.items() if value)}"
                )
            window = num_slots - plan.buffer - plan.num_sinks + 1
            if kind == "spatial" and window < columns + 2:
                short = min(window, short or window)
    if short is not None:
        warnings.warn(
            f"after an eviction a spatial head holds its last {short} visual tokens, fewer than a grid row and two "
            f"({columns + 2}): it can not see the token right above. Raise the budget, or lower buffer or num_sinks.",
            stacklevel=3,
        )
