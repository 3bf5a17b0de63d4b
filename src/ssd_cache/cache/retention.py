"""Which visual tokens a head keeps: pure tensor functions, no state.

A policy is a score; selecting the victims and moving the survivors is written once, here. docs/concepts.md has the
rules, after SSD (Jian and Wang, arXiv 2510.18716): a spatial head keeps its newest tokens, a semantic head those with
the highest score. This module does not depend on models, caches or head maps.
"""

from __future__ import annotations

import torch

SCORES = ("sum", "mean", "last", "margin", "learned")
"""Scores by which semantic heads can rank their tokens; `form_scores` computes all but the last."""

WITHOUT_QUERIES = ("margin", "learned")
"""Scores that need no attention, so that no queries are held."""


def attention_weights(
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    scaling: float,
    num_prompt: int,
    num_first: int,
    prompt_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax weights of consecutive one-token steps, all computed at once.

    At query `i`, `num_first + i` visual tokens were stored, its own included, so it sees the prompt and that many
    slots. Nothing may have been evicted in between.

    Args:
        query_states: `[batch, kv_heads, groups, steps, head_dim]`, `groups` query heads to a KV head.
        key_states: `[batch, kv_heads, num_prompt + stored, head_dim]`.
        scaling: factor on the products, as in the model's attention.
        num_prompt: prompt tokens at the front of `key_states`.
        num_first: visual tokens that the first query saw.
        prompt_mask: `[batch, num_prompt]`, False on padding.

    Returns:
        `[batch, kv_heads, groups, steps, num_prompt + stored]`, float32.
    """
    batch, heads, groups, steps, head_dim = query_states.shape
    length = key_states.shape[2]
    # scale before the product, as sdpa does: in fp16 the unscaled product can overflow when attention does not
    queries = query_states.reshape(batch, heads, groups * steps, head_dim) * scaling
    logits = (queries @ key_states.transpose(2, 3)).view(batch, heads, groups, steps, length).float()
    step = torch.arange(steps, device=logits.device)[:, None]
    column = torch.arange(length, device=logits.device)
    logits = logits.masked_fill(column >= num_prompt + num_first + step, float("-inf"))
    if prompt_mask is not None:
        logits[..., :num_prompt].masked_fill_(~prompt_mask[:, None, None, None], float("-inf"))
    return logits.softmax(-1)


def form_scores(
    score: str, attention: torch.Tensor, positions: torch.Tensor, num_seen: int, columns: int
) -> torch.Tensor:
    """Scores by which semantic heads rank their tokens; the lowest scores are evicted first.

    - "sum": the attention that a token received from all visual queries since it arrived, its own included.
    - "mean": that sum divided by the number of these queries, so that age alone gives no advantage.
    - "last": the attention that a token received from the last query window.
    - "margin": 1 in the first and the last column of the grid, 0 elsewhere; needs no queries.

    Args:
        score: one of `SCORES` except "learned", which `LearnedScore` computes.
        attention: `[batch, semantic_heads, slots]`, float32, the attention that each token received; for "last", only
            from the last query window; for "margin", not read.
        positions: the same shape, number of the visual token in each slot, counted from 0; every slot is taken.
        num_seen: number of visual tokens seen, all of them before the eviction.
        columns: number of grid columns; tokens fill the grid row by row.

    Returns:
        `[batch, semantic_heads, slots]`, float32.

    Example: tokens 0 to 3 of a grid with three columns. The oldest was seen by four queries, the newest by one.

        >>> attention, positions = torch.tensor([[[1.4, 0.6, 0.5, 0.3]]]), torch.tensor([[[0, 1, 2, 3]]])
        >>> form_scores("mean", attention, positions, num_seen=4, columns=3)
        tensor([[[0.3500, 0.2000, 0.2500, 0.3000]]])
        >>> form_scores("margin", attention, positions, num_seen=4, columns=3)
        tensor([[[1., 0., 1., 1.]]])
    """
    if score == "mean":
        return attention / (num_seen - positions)
    if score == "margin":
        column = positions % columns
        return ((column == 0) | (column == columns - 1)).float()
    return attention


def select_victims(
    positions: torch.Tensor,
    scores: torch.Tensor | None,
    num_evict: int,
    num_seen: int,
    num_recent: int = 0,
    num_sinks: int = 0,
) -> torch.Tensor:
    """Slots to empty in every head: the lowest scores in semantic heads, the oldest tokens in spatial heads.

    Semantic heads come first: `scores` covers the first heads, the rest are spatial. Every head keeps the first
    `num_sinks` tokens of the image; a semantic head also keeps its `num_recent` newest. Of equal scores the older token
    is dropped.

    Args:
        positions: `[batch, kv_heads, slots]`, number of the visual token in each slot, counted from 0; every slot is
            taken.
        scores: `[batch, semantic_heads, slots]`, float32, from `form_scores`; None if there is no semantic head.
        num_evict: tokens to drop from each head.
        num_seen: number of visual tokens seen so far, without the one that needs a slot.

    Returns:
        `[batch, kv_heads, num_evict]`, slots in ascending order.

    Example: four slots hold tokens 0, 1, 2, 3 and two must go. A spatial head drops 0 and 1 (with one sink: 1 and 2).
    A semantic head with scores 3, 1, 2, 0 and one recent drops 1 and 2: token 3 has the lowest score but is recent.

        >>> positions = torch.tensor([[[0, 1, 2, 3]]])
        >>> select_victims(positions, None, num_evict=2, num_seen=4, num_sinks=1)
        tensor([[[1, 2]]])
        >>> scores = torch.tensor([[[3.0, 1.0, 2.0, 0.0]]])
        >>> select_victims(positions, scores, num_evict=2, num_seen=4, num_recent=1)
        tensor([[[1, 2]]])
    """
    num_semantic = 0 if scores is None else scores.shape[1]
    victims = []
    if scores is not None and num_semantic:
        by_age = positions[:, :num_semantic].argsort(-1)
        spared = positions[:, :num_semantic] >= num_seen - num_recent
        if num_sinks:
            spared |= positions[:, :num_semantic] < num_sinks
        keep = scores.masked_fill(spared, float("inf")).gather(-1, by_age)
        lowest = keep.argsort(dim=-1, stable=True)[..., :num_evict]  # stable: of equal scores the older comes first
        victims.append(by_age.gather(-1, lowest))
    if num_semantic < positions.shape[1]:
        # every row and every spatial head holds the same tokens, in the same slots
        age = positions[0, num_semantic]
        oldest = torch.where(age < num_sinks, num_seen, age).argsort()[:num_evict]
        victims.append(oldest.expand(positions.shape[0], positions.shape[1] - num_semantic, num_evict))
    return torch.cat(victims, 1).sort(-1).values


def prefers_window(weights: torch.Tensor, scores: torch.Tensor, num_prompt: int, num_recent: int) -> torch.Tensor:
    """Whether a window keeps more attention than heavy hitters, head by head: the labels of an online map.

    The function takes the tokens that a head held before the newest queries, and two ways to keep half of them: the
    newest half (a spatial head), or the half with the highest scores, always with the newest tokens in it (a semantic
    head). The head is labelled by the half that received more attention from the newest queries. Sinks are left out,
    since both kinds keep the same ones. All rows of the batch count together; a tie makes the head semantic.

    Args:
        weights: `[batch, kv_heads, groups, steps, num_prompt + stored]`, the attention of the newest queries, with
            every token still in the slot in which it arrived.
        scores: `[batch, kv_heads, stored - steps]`, from `form_scores`, before these queries.
        num_prompt: columns of the prompt.
        num_recent: newest tokens that a semantic head always keeps, out of all stored tokens; the half keeps the same
            fraction.

    Returns:
        `[kv_heads]`, True where the window keeps more attention.
    """
    num_before, num_stored = scores.shape[-1], weights.shape[-1] - num_prompt
    num_kept = num_before // 2
    received = weights[..., num_prompt : num_prompt + num_before].sum((2, 3))  # [batch, kv_heads, num_before]
    ranks = scores.clone()
    ranks[..., num_before - num_recent * num_kept // num_stored :] = float("inf")
    # newest first, so that of equal scores the older token is dropped
    best = ranks.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :num_kept]
    hitters = received.flip(-1).gather(-1, best).sum((0, 2), dtype=torch.float64)
    return received[..., num_before - num_kept :].sum((0, 2), dtype=torch.float64) > hitters * (1 + 1e-6)


def compact(tensors: list[torch.Tensor], victims: torch.Tensor) -> None:
    """Empty the victims' slots in place and make the last slots the free ones; at most `num_evict` rows move per head.

    Survivors in the last `num_evict` slots move into the victims' slots before them. No other row is touched.

    Args:
        tensors: each `[batch, heads, slots]` or `[batch, heads, slots, head_dim]`, all slots taken; `heads` may be
            fewer than `kv_heads`, and are then the first ones.
        victims: `[batch, kv_heads, num_evict]`, in ascending order (see `select_victims`).
    """
    num_slots, num_evict = tensors[0].shape[2], victims.shape[-1]
    first_free = num_slots - num_evict
    # The tail's survivors come first, in order. There are as many of them as victims before the tail, and the victims
    # are sorted, so the pairs match. The remaining pairs copy dead rows onto dead rows.
    is_dead = torch.zeros(*victims.shape[:2], num_slots, dtype=torch.bool, device=victims.device)
    is_dead.scatter_(2, victims, True)
    sources = is_dead[..., first_free:].to(torch.uint8).argsort(dim=-1, stable=True) + first_free
    rows, heads = (torch.arange(size, device=victims.device) for size in victims.shape[:2])
    for tensor in tensors:
        first = slice(tensor.shape[1])
        places = rows[:, None, None], heads[None, first, None]
        tensor[*places, victims[:, first]] = tensor[*places, sources[:, first]]
