"""What could the best choice of tokens do? shapes drawn with an attention that chooses anew at every step, from all.

    python examples/oracle_study.py --budget 0.2

Nothing is evicted. Every head looks at the prompt, the new token, and those of all other visual tokens that receive
the most of its attention in this very step, as many as a cache of that budget has slots. No cache can choose better by
attention, since it has to drop tokens before it knows who will ask for them. So this bounds what any score can reach,
and what it still lacks of the full cache is lost by looking at so few tokens at all. It saves neither memory nor time.
"""

from __future__ import annotations

import torch
import typer
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ssd_cache import HeadMap, SSDCache
from ssd_cache.evaluation.bootstrap import compare, score
from ssd_cache.evaluation.conditions import draw_seed
from ssd_cache.evaluation.policies import choose_head_map, parse_policies
from ssd_cache.evaluation.shapes import check_model, shapes_prompts
from ssd_cache.models import Generator, find_generator
from ssd_cache.shapes import KINDS, judge

NAME = "oracle"


class Oracle:
    """An attention function of transformers.

    Args:
        num_slots: `[layers, kv_heads]`, visual tokens a head may look at, the new one included.
    """

    def __init__(self, num_slots: torch.Tensor):
        self.num_slots, self.num_prompt = num_slots, 0

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
        keep_most_attended(weights[..., self.num_prompt : -1], self.num_slots[module.layer_idx] - 1)
        output = weights / weights.sum(-1, keepdim=True) @ value
        return output.reshape(batch, 1, num_heads, -1), None


def keep_most_attended(weights: torch.Tensor, num_kept: torch.Tensor) -> None:
    """Set all weights to zero, in place, but the largest, summed over the query heads of a KV head.

    Args:
        weights: `[batch, kv_heads, groups, tokens]`.
        num_kept: `[kv_heads]`, how many tokens keep theirs.
    """
    most = int(num_kept.max())
    if most == 0:
        weights.zero_()
    if most == 0 or int(num_kept.min()) >= weights.shape[3]:
        return
    received = weights.sum(2)
    largest = received.topk(min(most, received.shape[2])).values
    index = (num_kept - 1).clamp(0, largest.shape[2] - 1)
    least = largest.gather(2, index[None, :, None].expand(len(received), -1, 1))
    least[:, num_kept == 0] = torch.inf
    weights.masked_fill_((received < least)[:, :, None], 0)


def slots_of(policy: str, head_map: HeadMap, budget: float) -> torch.Tensor:
    """Slots of each head, `[layers, kv_heads]`, in a cache of this policy."""
    cache = parse_policies(policy)[0].make_cache(head_map, budget)
    return torch.tensor([layer.plan.num_slots for layer in cache.layers])


def main(
    budget: float = 0.2,
    per_kind: int = 100,
    batch_size: int = 100,
    prompt_seed: int = 1,
    seed: int = 0,
    model: str = "shapes-janus",
    device: str = "auto",
) -> None:
    """Print the share of correct pictures: the full cache, and the oracle with the slots of `ssd` and of `fitted`."""
    checkpoint = find_generator(model)
    check_model(checkpoint)
    head_map = choose_head_map(checkpoint, None, parse_policies("ssd,fitted"))
    prompts = shapes_prompts(per_kind, prompt_seed)
    generator = checkpoint.load("float32", device)
    everything = torch.full_like(slots_of("ssd", head_map, budget), head_map.num_visual_tokens)
    slots = {"everything": everything} | {name: slots_of(name, head_map, budget) for name in ("ssd", "fitted")}
    full = None
    for name, num_slots in slots.items():
        found = draw(generator, head_map, num_slots, prompts, batch_size, seed, f"slots of {name}")
        full = found if full is None else full
        reached, less = score(found, KINDS), compare(found, full, KINDS)
        kinds = ", ".join(f"{kind} {share:.2f}" for kind, share in reached.kinds.items())
        print(
            f"slots of {name}: {reached.overall:.3f} +- {reached.standard_error:.3f} ({kinds}); less everything "
            f"{less.difference:+.3f}, 95% {less.low:+.3f} to {less.high:+.3f}, {less.num_pictures} pictures"
        )


def look_through(generator: Generator, num_slots: torch.Tensor) -> None:
    """Give the model the oracle for its attention."""
    AttentionInterface.register(NAME, Oracle(num_slots.to(generator.model.device)))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    generator.model.set_attn_implementation({"text_config": NAME})


def draw(
    generator: Generator,
    head_map: HeadMap,
    num_slots: torch.Tensor,
    prompts: list[tuple[str, str]],
    batch_size: int,
    seed: int,
    name: str,
) -> dict[str, dict[int, dict[int, bool]]]:
    """Verdicts on one picture a prompt, with the draws of chance that `ssd-cache eval shapes` has."""
    look_through(generator, num_slots)
    verdicts: dict[str, dict[int, dict[int, bool]]] = {}
    steps = -(-len(prompts) // batch_size) * generator.checkpoint.num_visual_tokens
    with tqdm(total=steps, desc=name, unit="step", mininterval=5) as bar:
        for number, start in enumerate(range(0, len(prompts), batch_size)):
            captions = [caption for _, caption in prompts[start : start + batch_size]]
            # a cache that keeps everything, and does not copy itself at every step as DynamicCache does
            tokens = generator.generate(
                captions,
                SSDCache.from_policy("full", head_map),
                seed=draw_seed(seed, number),
                on_tokens=lambda _: bar.update(),
            )
            for index, picture in enumerate(tokens.cpu().numpy(), start):
                kind, caption = prompts[index]
                verdicts.setdefault(kind, {})[index] = {seed: judge(picture, caption).correct}
    return verdicts


if __name__ == "__main__":
    typer.run(main)
