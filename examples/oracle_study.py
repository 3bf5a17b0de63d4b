"""How few tokens could be enough? Compare cache policies on shapes with oracles that know all attention weights.

    python examples/oracle_study.py --budget 0.2 --policy ssd

*At each step* a head attends only to the tokens with the largest weights of this step, as many as it has slots. No
token is dropped for good. *In hindsight* drops tokens for good, `buffer` at once: those that will receive the least
attention later, as recorded while the same images were generated with all tokens. It bounds what a score could reach.
Neither oracle saves memory or time. Neither uses labels: every head keeps the tokens that suit it best.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import typer
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ssd_cache import HeadMap, SSDCache
from ssd_cache.evaluation.bootstrap import compare, mean, standard_error
from ssd_cache.evaluation.conditions import hashed_seed
from ssd_cache.evaluation.exact import SHAPES
from ssd_cache.evaluation.policies import choose_head_map, parse_policies
from ssd_cache.models import Generator, find_generator
from ssd_cache.shapes import KINDS, judge

NAME = "oracle"
Hide = Callable[[int, torch.Tensor], torch.Tensor | None]
"""Maps a layer index and the attention that the visual tokens of a step receive to a mask of tokens to hide.

The attention is `[rows, kv_heads, tokens]`, with the new token last. The mask is boolean and of that shape, or None to
hide nothing.
"""


class HidingAttention:
    """An attention function of transformers that masks, in one-token steps, the tokens that `hide` selects."""

    def __init__(self, hide: Hide):
        self.hide, self.num_prompt = hide, 0

    def __call__(self, module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        if query.shape[2] > 1:
            self.num_prompt = key.shape[2]
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        batch, num_heads, _, head_dim = query.shape
        grouped = query.view(batch, key.shape[1], num_heads // key.shape[1], head_dim)
        logits = grouped @ key.mT * (head_dim**-0.5 if scaling is None else scaling)
        if attention_mask is not None:
            logits = logits.masked_fill(~attention_mask, -torch.inf)
        weights = logits.softmax(-1)
        hidden = self.hide(module.layer_idx, weights[..., self.num_prompt :].sum(2))
        if hidden is not None:
            logits[..., self.num_prompt :].masked_fill_(hidden[:, :, None], -torch.inf)
            weights = logits.softmax(-1)
        return (weights @ value).reshape(batch, 1, num_heads, -1), None


class AtEachStep:
    """Hides all tokens except the most attended of this step.

    Args:
        num_slots: `[layers, kv_heads]`, visual tokens that a head may attend to, including the new one.
    """

    def __init__(self, num_slots: torch.Tensor):
        self.num_slots = num_slots

    def __call__(self, layer: int, received: torch.Tensor) -> torch.Tensor | None:
        return hide_least_attended(received, self.num_slots[layer])


class Recorder:
    """Hides nothing, and records the attention that every token received from every query."""

    def __init__(self, num_layers: int):
        self.received: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]

    def __call__(self, layer: int, received: torch.Tensor) -> None:
        self.received[layer].append(received.half())

    def future(self, layer: int) -> torch.Tensor:
        """Attention that each token receives from each step on, `[steps, rows, kv_heads, tokens]`; frees the record."""
        steps = self.received[layer]
        num_tokens = steps[-1].shape[-1]
        future = torch.stack([torch.nn.functional.pad(step, (0, num_tokens - step.shape[-1])) for step in steps])
        steps.clear()
        for later in range(len(future) - 2, -1, -1):
            future[later] += future[later + 1]
        return future


class InHindsight:
    """Hides the dropped tokens: those with the least attention still to come.

    Args:
        recorder: a record of the same images, generated with all tokens.
        num_slots: `[layers, kv_heads]`.
        buffer: tokens dropped at once.
    """

    def __init__(self, recorder: Recorder, num_slots: torch.Tensor, buffer: int):
        self.num_slots, self.buffer = num_slots, buffer
        # for each layer: number of slots -> tokens dropped up to each eviction in heads with so many slots; see `drops`
        self.dropped: list[dict[int, list[torch.Tensor]]] = []
        for layer, slots in enumerate(num_slots):
            future = recorder.future(layer)
            self.dropped.append(
                {int(size): drops(future[:, :, slots == size], int(size), buffer) for size in set(slots.tolist())}
            )

    def __call__(self, layer: int, received: torch.Tensor) -> torch.Tensor:
        hidden, step = torch.zeros_like(received, dtype=torch.bool), received.shape[2] - 1
        for size, dropped in self.dropped[layer].items():
            if step >= size:
                evictions = (step - size) // self.buffer
                hidden[:, self.num_slots[layer] == size] = dropped[evictions][:, :, : step + 1]
        return hidden


def drops(future: torch.Tensor, num_slots: int, buffer: int) -> list[torch.Tensor]:
    """Tokens dropped up to each eviction; an eviction happens when all slots are taken and a token arrives.

    Args:
        future: `[steps, rows, heads, tokens]`, the attention still to come at each step.

    Returns:
        For each eviction, booleans `[rows, heads, tokens]`.
    """
    gone = torch.zeros(future.shape[1:], dtype=torch.bool)
    found = []
    for step in range(num_slots, len(future), buffer):
        to_come = future[step, :, :, :step].float().masked_fill(gone[:, :, :step], torch.inf)
        gone = gone.clone()
        gone[:, :, :step].scatter_(2, to_come.topk(buffer, largest=False).indices, True)
        found.append(gone)
    return found


def hide_least_attended(received: torch.Tensor, num_slots: torch.Tensor) -> torch.Tensor | None:
    """Hide all tokens except the new one, which is last, and the most attended others, as many as slots remain.

    Args:
        received: `[rows, kv_heads, tokens]`.
        num_slots: `[kv_heads]`.

    Returns:
        Booleans of the shape of `received`, or None if all tokens have a slot.
    """
    if received.shape[2] <= int(num_slots.min()):
        return None
    order = received[:, :, :-1].argsort(dim=2, descending=True)
    is_after = torch.arange(order.shape[2]) >= (num_slots - 1)[:, None]
    return torch.zeros_like(received, dtype=torch.bool).scatter_(2, order, is_after.expand_as(order))


def main(
    budget: float = 0.2,
    policy: str = "ssd",
    buffer: int = 24,
    per_kind: int = 30,
    batch_size: int = 45,
    prompt_seed: int = 1,
    seed: int = 0,
    model: str = "shapes-janus",
) -> None:
    """Print the share of correct images with all tokens, and with each oracle, given the slots of a policy.

    The attention record takes 40 MB per image of shapes-janus: choose the batch size accordingly.
    """
    checkpoint = find_generator(model)
    SHAPES.check_model(checkpoint)
    head_map = choose_head_map(checkpoint, None, parse_policies(policy))
    cache = parse_policies(policy)[0].make_cache(head_map, budget)
    num_slots = torch.tensor([layer.plan.num_slots for layer in cache.layers])
    prompts = SHAPES.prompts(per_kind, prompt_seed)
    generator = checkpoint.load("float32", "cpu")
    found: dict[str, dict[str, dict[int, float]]] = {}  # oracle -> kind -> caption -> whether it is correct
    for number, start in enumerate(tqdm(range(0, len(prompts), batch_size), unit="batch")):
        batch, recorder = prompts[start : start + batch_size], Recorder(head_map.num_layers)
        for name, make in {
            "everything": lambda recorder=recorder: recorder,
            "at each step": lambda: AtEachStep(num_slots),
            "in hindsight": lambda recorder=recorder: InHindsight(recorder, num_slots, buffer),
        }.items():
            tokens = generate_hidden(
                generator, head_map, make(), [caption for _, caption in batch], hashed_seed(seed, number)
            )
            for index, image in enumerate(tokens.cpu().numpy(), start):
                kind, caption = prompts[index]
                of_kind = found.setdefault(name, {kind: {} for kind in KINDS})[kind]
                of_kind[index] = float(judge(image, caption).correct)
    for name, results in found.items():
        kinds = ", ".join(f"{kind} {mean({kind: results[kind]}):.2f}" for kind in KINDS)
        difference, interval, _ = compare(results, found["everything"]).cells(3)
        print(
            f"{name}: {mean(results):.3f} +- {standard_error(results):.3f} ({kinds}); less everything {difference}, "
            f"95% {interval}, {len(prompts)} images"
        )


def generate_hidden(
    generator: Generator, head_map: HeadMap, hide: Hide, captions: list[str], seed: int
) -> torch.Tensor:
    """Visual tokens `[batch, cells]`, generated with an attention that hides some of them."""
    AttentionInterface.register(NAME, HidingAttention(hide))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    generator.model.set_attn_implementation({"text_config": NAME})
    # a cache that keeps all tokens, and unlike DynamicCache does not copy itself at every step
    return generator.generate(captions, SSDCache.from_policy("full", head_map), seed=seed)


if __name__ == "__main__":
    typer.run(main)
