"""Random runs of one layer, through a cache and through the plain loops of reference.py, step by step."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st

from helpers.models import random_score
from helpers.reference import AmbiguousError, ReferenceHead, eight_bits
from ssd_cache import HeadMap, SSDCache
from ssd_cache.cache.attention import ssd_attention_forward
from ssd_cache.cache.scorers import SCORES


def held_tokens(layer) -> dict[tuple[int, int], list[int]]:
    """(row, KV head) -> visual tokens that a layer holds, ascending."""
    return {
        (row, head): tokens
        for head, positions in enumerate(layer.held_positions())
        for row, tokens in enumerate(positions.tolist())
    }


def step_through(cache, queries, keys, values, num_prompt, seen, is_counted=False):
    """Feed one layer the way a model does; yields (step, output `[batch, heads, head_dim]`) for the visual tokens.

    is_counted: from the second visual token on, inside `static_step`, as `fast_decode` does.
    """
    module = SimpleNamespace(num_key_value_groups=queries.shape[1] // keys.shape[1], is_causal=True)
    total, start = keys.shape[2], 0
    for end in [num_prompt, *range(num_prompt + 1, total + 1)]:
        new = slice(start, end)
        kv_length, _ = cache.get_mask_sizes(end - start, 0)
        mask = None
        if start == 0 and seen is not None:
            causal = torch.ones(end, end, dtype=torch.bool).tril()
            mask = (causal & seen[:, None, :]).unsqueeze(1)
        counting = is_counted and cache.can_step_statically
        with cache.static_step() if counting else nullcontext():
            key_states, value_states = cache.update(keys[:, :, new], values[:, :, new], 0)
            if isinstance(key_states, torch.Tensor) and not counting:
                assert key_states.shape[2] == kv_length, "get_mask_sizes must announce what update returns"
            output, weights = ssd_attention_forward(module, queries[:, :, new], key_states, value_states, mask)
        assert weights is None
        if start >= num_prompt:
            yield start - num_prompt, output[:, 0]
        start = end
    assert cache.get_seq_length() == total


def step_reference(reference, queries, keys, values, num_prompt, step, seen):
    """The same step in plain loops: (row, KV head) -> outputs `[groups, head_dim]`, float64."""
    at, groups, outputs = num_prompt + step, queries.shape[1] // keys.shape[1], {}
    for (row, head), slow in reference.items():
        try:
            output = slow.step(
                queries[row, head * groups : (head + 1) * groups, at].tolist(),
                keys[row, head, at].tolist(),
                values[row, head, at].tolist(),
                keys[row, head, :num_prompt].tolist(),
                values[row, head, :num_prompt].tolist(),
                [True] * num_prompt if seen is None else seen[row].tolist(),
                keys.shape[-1] ** -0.5,
            )
        except AmbiguousError:
            assume(False)
        outputs[row, head] = torch.tensor(output, dtype=torch.float64)
    return outputs


@st.composite
def runs(draw, largest_side=5):
    """The settings of a run. In most runs, semantic heads choose by score which tokens they evict."""
    grid = (draw(st.integers(2, largest_side)), draw(st.integers(2, largest_side)))
    cells = grid[0] * grid[1]
    chooses = draw(st.sampled_from([True, True, True, False]))
    room = cells - 2 if chooses else cells + 13  # for tokens that are evicted at once or never evicted
    buffer = draw(st.integers(1, min(6, room)))
    num_recent = draw(st.integers(0, min(4, room - buffer)))
    num_sinks = draw(st.integers(0, min(3, room - buffer - num_recent)))
    least = buffer + num_recent + num_sinks
    enough = st.integers(min(least, cells), cells)
    slots = {"spatial": draw(enough), "semantic": draw(st.integers(least + 1, cells - 1) if chooses else enough)}
    if draw(st.booleans()):
        slots["spatial"] = slots["semantic"]
    heads = st.lists(st.booleans(), min_size=1, max_size=4)
    return {
        "grid": grid,
        "buffer": buffer,
        "num_recent": num_recent,
        "num_sinks": num_sinks,
        "score": draw(st.sampled_from(list(SCORES))),
        "ranks_all": draw(st.booleans()),  # of a learned score: spatial heads rank their tokens too
        "slots": slots,
        "is_spatial": draw(heads.filter(lambda spatial: not all(spatial)) if chooses else heads),
        "groups": draw(st.integers(1, 3)),
        "batch": draw(st.integers(1, 3)),
        "num_prompt": draw(st.integers(1, 4)),
        "num_visual": draw(st.integers(slots["semantic"] + 1 if chooses else 1, cells + 3)),
        "padded": draw(st.booleans()),
        "sharpness": draw(st.sampled_from([0.3, 1.0, 3.0])),
        "seed": draw(st.integers(0, 2**20)),
    }


def chooses_by_score(run) -> bool:
    """Whether a head that ranks its tokens evicts in this run, and has more candidates than it evicts."""
    cells, least = run["grid"][0] * run["grid"][1], run["buffer"] + run["num_recent"] + run["num_sinks"]
    ranks_all = run["score"] == "learned" and run["ranks_all"]
    kinds = {"spatial" if spatial else "semantic" for spatial in run["is_spatial"]}
    ranking = [run["slots"][kind] for kind in kinds if ranks_all or kind == "semantic"]
    return any(least < slots < cells and run["num_visual"] > slots for slots in ranking)


def same_as_plain_loops(run, is_counted, kv_dtype=None):
    """Assert that a cache keeps the tokens of the plain loops at every step and attends as they do; returns it.

    kv_dtype: of the cache; the plain loops then get the visual tokens as they come back from 8 bits.
    """
    torch.manual_seed(run["seed"])
    batch, kv_heads, groups, dim = run["batch"], len(run["is_spatial"]), run["groups"], 4
    total = run["num_prompt"] + run["num_visual"]
    queries = torch.randn(batch, kv_heads * groups, total, dim) * run["sharpness"]
    keys, values = torch.randn(batch, kv_heads, total, dim), torch.randn(batch, kv_heads, total, dim)
    held_keys, held_values = keys, values
    if kv_dtype is not None:
        held_keys, held_values = (after_eight_bits(states, run["num_prompt"], kv_dtype) for states in (keys, values))
    seen = None
    if run["padded"]:
        pads = torch.randint(0, run["num_prompt"], (batch,))
        seen = torch.arange(run["num_prompt"]) >= pads[:, None]
    learned = None
    if run["score"] == "learned":
        learned = random_score(1, kv_heads, dim, run["grid"], run["ranks_all"])
    head_map = HeadMap(torch.tensor([run["is_spatial"]]), grid=run["grid"], learned=learned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # windows shorter than a row are drawn on purpose
        cache = SSDCache(
            head_map,
            run["slots"],
            buffer=run["buffer"],
            num_recent=run["num_recent"],
            num_sinks=run["num_sinks"],
            score=run["score"],
            kv_dtype=kv_dtype,
        )
        cells = run["grid"][0] * run["grid"][1]
        reference = {
            (row, head): ReferenceHead(
                "spatial" if spatial and not (learned and learned.ranks_all) else "semantic",
                run["slots"]["spatial" if spatial else "semantic"],
                cells,
                run["buffer"],
                run["num_recent"],
                run["num_sinks"],
                run["score"],
                run["grid"][1],
                learned and [getattr(learned, name)[0, head].tolist() for name in ("key", "value", "row", "column")],
            )
            for row in range(batch)
            for head, spatial in enumerate(run["is_spatial"])
        }
        errors, torch_errors = [], []
        for step, output in step_through(cache, queries, keys, values, run["num_prompt"], seen, is_counted):
            held = held_tokens(cache.layers[0])
            at = run["num_prompt"] + step
            slowly = step_reference(reference, queries, held_keys, held_values, run["num_prompt"], step, seen)
            for (row, head), slow in reference.items():
                mine = slice(head * groups, (head + 1) * groups)
                prompt_seen = [True] * run["num_prompt"] if seen is None else seen[row].tolist()
                assert held[row, head] == sorted(slow.kept)
                expected = slowly[row, head]
                errors.append((output[row, mine].double() - expected).abs().max())
                columns = [c for c in range(run["num_prompt"]) if prompt_seen[c]]
                columns += [run["num_prompt"] + token for token in sorted(slow.kept)]
                plain = F.scaled_dot_product_attention(
                    queries[row, mine, at][:, None],
                    held_keys[row, [head] * groups][:, columns],
                    held_values[row, [head] * groups][:, columns],
                )
                torch_errors.append((plain[:, 0].double() - expected).abs().max())
    assert any(slow.has_chosen for slow in reference.values()) == chooses_by_score(run)
    # at most twice the error of torch's own attention over the same tokens; 1e-6 for runs in which that is nil
    assert max(errors) <= 2 * max(torch_errors) + 1e-6
    return cache


def after_eight_bits(states, num_prompt, kv_dtype):
    """`[batch, heads, tokens, head_dim]`, the visual ones of them quantised and back, in plain loops."""
    visual = states[:, :, num_prompt:]
    held = [eight_bits(numbers, kv_dtype)[2] for numbers in visual.flatten(0, 2).tolist()]
    return torch.cat([states[:, :, :num_prompt], torch.tensor(held).view_as(visual)], dim=2)
