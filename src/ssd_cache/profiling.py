"""`profile_heads`: watch a model draw with a full cache, and call each head spatial or semantic by where it looks.

The watching goes through the attention "ssd": the queries of a grid row are held and their softmax is made once a row,
so no attention matrix is ever stored. It labels heads; what labels are good for is measured in `evaluation`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import Cache, PreTrainedModel, ProcessorMixin

from ssd_cache.enable import ssd_attention
from ssd_cache.head_map import HeadMap
from ssd_cache.layer import LayerPlan, SSDLayer
from ssd_cache.models import Generator, generator_of
from ssd_cache.slots import SlotStore

THRESHOLD = 0.5
"""Window mass from which a head is spatial: more of its visual attention lies inside the window than outside."""


class WindowMass:
    """Share of a head's visual attention that lies on its last `window` visual tokens.

    With `a[t, j]` the softmax weight that the query of visual token `t` gives to visual token `j <= t`, the score is
    `sum(a[t, j] for t, j > t - window) / sum(a[t, j] for t, j)`: over the query heads of a KV head, the rows of the
    batch, and the `t >= window`, since before that all tokens lie inside. A head that looks at the prompt alone has 0.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, window: int):
        self.window = window
        self.inside = torch.zeros(num_layers, num_kv_heads, dtype=torch.float64)
        self.visual = torch.zeros(num_layers, num_kv_heads, dtype=torch.float64)

    def add(self, layer_idx: int, weights: torch.Tensor, num_prompt: int) -> None:
        """Take in `[batch, kv_heads, groups, steps, num_prompt + stored]`, the last query on the last token."""
        visual = weights[..., num_prompt:]
        steps, stored = visual.shape[-2:]
        token = torch.arange(stored - steps, stored, device=visual.device)[:, None]
        near = torch.arange(stored, device=visual.device) > token - self.window
        visual = visual * (token >= self.window)
        self.visual[layer_idx] += visual.sum((0, 2, 3, 4), dtype=torch.float64).cpu()
        self.inside[layer_idx] += (visual * near).sum((0, 2, 3, 4), dtype=torch.float64).cpu()

    @property
    def score(self) -> torch.Tensor:
        """`[layers, kv_heads]`, float64, in [0, 1]."""
        return self.inside / self.visual.clamp(min=torch.finfo(torch.float64).tiny)


class _WatchingStore(SlotStore):
    """Slots that report the attention they would have been scored by, and keep every token."""

    def __init__(self, *args, layer_idx: int, statistics: WindowMass, **kwargs):
        super().__init__(*args, **kwargs)
        self.layer_idx, self.statistics = layer_idx, statistics

    def _receive(self, weights: torch.Tensor) -> None:
        self.statistics.add(self.layer_idx, weights, self.num_prompt)


class _WatchingLayer(SSDLayer):
    def __init__(self, plan: LayerPlan, statistics: WindowMass):
        self.statistics = statistics
        super().__init__(plan)

    def make_store(self, *args, **kwargs) -> SlotStore:
        return _WatchingStore(*args, layer_idx=self.plan.layer_idx, statistics=self.statistics, **kwargs)


def watching_cache(grid: tuple[int, int], statistics: WindowMass) -> Cache:
    """A full cache that shows every step's attention to `statistics`."""
    num_layers, num_kv_heads = statistics.inside.shape
    cells = grid[0] * grid[1]
    # one cell more than the grid has, so that every head counts as one that is scored
    plans = [
        LayerPlan(layer, (False,) * num_kv_heads, {"semantic": cells, "spatial": cells}, cells + 1, grid[1], 0, 0)
        for layer in range(num_layers)
    ]
    return Cache(layers=[_WatchingLayer(plan, statistics) for plan in plans])


def check_profiling(grid: tuple[int, int], window: int | None, threshold: float, batch_size: int) -> int:
    """The window to use, when all settings are in range.

    Raises:
        ValueError: otherwise.
    """
    rows, columns = grid
    window = columns + 1 if window is None else window
    if not 1 <= window < rows * columns:
        raise ValueError(f"window={window} is out of range: give 1 to {rows * columns - 1} visual tokens")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold} is out of range: give a number between 0 and 1")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is out of range: give 1 or more")
    return window


def profile_heads(
    model: PreTrainedModel | Generator,
    prompts: Sequence[str],
    *,
    processor: ProcessorMixin | None = None,
    window: int | None = None,
    threshold: float = THRESHOLD,
    batch_size: int = 4,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> HeadMap:
    """Label a model's heads from pictures that it draws with a full cache (SSD's "sparsity profiling").

    A head is spatial when its window mass (see `WindowMass`) is at least `threshold`. The paper gives no formula; this
    one is ours.

    Args:
        model: a loaded image model of a supported family, or a `Generator`.
        prompts: one picture is drawn for each.
        processor: the model's; loaded from where the model came from when not given.
        window: visual tokens that count as near; a grid row and one when not given, so that "right above" is inside.
        threshold: between 0 and 1.
        batch_size: pictures drawn at once.
        guidance_scale: as for `Generator.generate`.
        temperature: as for `Generator.generate`.
        seed: of the first batch; batch `i` is drawn with `seed + i`.
        progress: show a bar over visual tokens.

    Returns:
        The map with its scores ("window_mass"), threshold, model and profile, ready for `save_pretrained`.

    Raises:
        GeneratorError: no prompts, an unsupported model, or a drawing setting out of range.
        ValueError: a window or threshold out of range.
    """
    generator = model if isinstance(model, Generator) else generator_of(model, processor)
    checkpoint = generator.checkpoint
    rows, columns = checkpoint.grid
    window = check_profiling(checkpoint.grid, window, threshold, batch_size)
    prompts = list(prompts)
    statistics = WindowMass(checkpoint.num_layers, checkpoint.num_kv_heads, window)
    with (
        ssd_attention(generator.model),
        tqdm(total=max(1, len(prompts)) * rows * columns, unit="token", disable=not progress, desc="profiling") as bar,
    ):
        for batch, start in enumerate(range(0, max(1, len(prompts)), batch_size)):
            generator.generate(
                prompts[start : start + batch_size],
                watching_cache(checkpoint.grid, statistics),
                guidance_scale=guidance_scale,
                temperature=temperature,
                seed=seed + batch,
                on_tokens=bar.update,
            )
    scores = statistics.score.float()
    return HeadMap(
        scores >= threshold,
        checkpoint.grid,
        scores={"window_mass": scores},
        threshold=threshold,
        model_id=checkpoint.name,
        revision=getattr(checkpoint.config, "_commit_hash", None),
        model_type=checkpoint.config.model_type,
        method="window mass",
        profile={
            "window": window,
            "num_prompts": len(prompts),
            "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
            "batch_size": batch_size,
            "guidance_scale": generator.guidance_scale if guidance_scale is None else guidance_scale,
            "temperature": generator.temperature if temperature is None else temperature,
            "seed": seed,
        },
    )
