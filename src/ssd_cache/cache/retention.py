"""Which visual tokens a head keeps: pure tensor functions, no state.

A policy is a score; choosing the victims and moving the survivors is written once, here. The rules are those of
docs/concepts.md, after SSD (Jian and Wang, arXiv 2510.18716): a spatial head keeps its newest tokens, a semantic head
those of highest score. Nothing here knows of models, caches or head maps.
"""

from __future__ import annotations

import torch

SCORES = ("sum", "mean", "last", "margin", "learned")
"""Names of what semantic heads may rank their tokens by; all but the last are formed by `form_scores`."""

WITHOUT_QUERIES = ("margin", "learned")
"""Those that ask for no attention, so that no query has to be held."""


def attention_weights(
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    scaling: float,
    num_prompt: int,
    num_first: int,
    prompt_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax weights of consecutive one-token steps, all computed at once.

    Query `i` was made when `num_first + i` visual tokens were stored, itself included, so it sees the prompt and
    that many slots. Nothing may have been evicted in between.

    Args:
        query_states: `[batch, kv_heads, groups, steps, head_dim]`, `groups` query heads to a KV head.
        key_states: `[batch, kv_heads, num_prompt + stored, head_dim]`.
        scaling: factor on the products, as the model's attention uses it.
        num_prompt: prompt tokens at the front of `key_states`.
        num_first: visual tokens that the first query saw.
        prompt_mask: `[batch, num_prompt]`, False on padding.

    Returns:
        `[batch, kv_heads, groups, steps, num_prompt + stored]`, float32.
    """
    batch, heads, groups, steps, head_dim = query_states.shape
    length = key_states.shape[2]
    # scaled before the product, as sdpa does: in fp16 the bare product overflows where the attention itself does not
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
    """What semantic heads rank their tokens by; those of the lowest scores go first.

    - "sum": the attention that a token received from all visual queries since it arrived, its own included.
    - "mean": the same over the number of these queries, so that a token does not gain by its age alone.
    - "last": the attention that it received from the last stretch of queries.
    - "margin": 1 in the first and the last column of the grid, 0 elsewhere; no query is asked.

    Args:
        score: one of `SCORES` but "learned", which is a `LearnedScore`'s.
        attention: `[batch, semantic_heads, slots]`, float32, what each token received: for "last" from the last
            stretch alone, for "margin" not read.
        positions: the same shape, which visual token sits in a slot, counted from 0; every slot is taken.
        num_seen: visual tokens seen, all of them before the eviction.
        columns: of the grid, which tokens fill row by row.

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
    """Slots to empty in every head: the lowest scores of semantic heads, the oldest tokens of spatial ones.

    Semantic heads come first: `scores` covers the first of the heads, the rest are spatial. Every head spares the first
    `num_sinks` tokens of the picture, a semantic one its `num_recent` newest too; of equal scores the older token goes.

    Args:
        positions: `[batch, kv_heads, slots]`, which visual token sits in a slot, counted from 0; every slot is taken.
        scores: `[batch, semantic_heads, slots]`, float32, of `form_scores`; None when there is no semantic head.
        num_evict: tokens to drop from each head.
        num_seen: visual tokens seen so far, the one that asks for room not counted.

    Returns:
        `[batch, kv_heads, num_evict]`, slots in rising order.

    Example: four slots hold tokens 0, 1, 2, 3 and two must go. A spatial head drops 0 and 1 (with one sink: 1 and 2).
    A semantic head with scores 3, 1, 2, 0 and one recent drops 1 and 2: token 3 has the lowest score and is spared.

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
    """Which kind would have served each head better: the label of an online map.

    Looks back at the newest queries. When the first of them came, the head held the tokens before it. Had it kept half
    of these, the newest half (as a spatial head) or the half of highest score (as a semantic head, its newest ones
    spared), which half received more of the attention that followed? Sinks are left out, since both kinds keep the same
    ones. Rows of the batch count together; of equal halves the semantic one wins.

    Args:
        weights: `[batch, kv_heads, groups, steps, num_prompt + stored]`, the attention of the newest queries, every
            token still in the slot of its arrival.
        scores: `[batch, kv_heads, stored - steps]`, of `form_scores`, before these queries.
        num_prompt: columns of the prompt.
        num_recent: newest tokens that a semantic head spares of all that is stored; of the half, the same share.

    Returns:
        `[kv_heads]`, True where the window keeps more.
    """
    num_before, num_stored = scores.shape[-1], weights.shape[-1] - num_prompt
    num_kept = num_before // 2
    received = weights[..., num_prompt : num_prompt + num_before].sum((2, 3))  # [batch, kv_heads, num_before]
    ranks = scores.clone()
    ranks[..., num_before - num_recent * num_kept // num_stored :] = float("inf")
    # the newest first, so that of equal scores the older token goes
    best = ranks.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :num_kept]
    hitters = received.flip(-1).gather(-1, best).sum((0, 2), dtype=torch.float64)
    return received[..., num_before - num_kept :].sum((0, 2), dtype=torch.float64) > hitters * (1 + 1e-6)


def compact(tensors: list[torch.Tensor], victims: torch.Tensor) -> None:
    """Empty the victims' slots in place, so that the free ones are the last: at most `num_evict` rows move a head.

    Survivors among the last `num_evict` slots move into the victims' places before them; no other row is touched.

    Args:
        tensors: each `[batch, heads, slots]` or `[batch, heads, slots, head_dim]`, all slots taken; `heads` may be
            fewer than the victims', then they are the first ones.
        victims: `[batch, kv_heads, num_evict]`, rising (see `select_victims`).
    """
    num_slots, num_evict = tensors[0].shape[2], victims.shape[-1]
    first_free = num_slots - num_evict
    # Survivors of the tail first, in order. There are as many of them as victims in front of the tail, and the
    # victims are sorted, so the pairs match; what is left over moves dead rows onto dead rows.
    is_dead = torch.zeros(*victims.shape[:2], num_slots, dtype=torch.bool, device=victims.device)
    is_dead.scatter_(2, victims, True)
    sources = is_dead[..., first_free:].to(torch.uint8).argsort(dim=-1, stable=True) + first_free
    rows, heads = (torch.arange(size, device=victims.device) for size in victims.shape[:2])
    for tensor in tensors:
        first = slice(tensor.shape[1])
        places = rows[:, None, None], heads[None, first, None]
        tensor[*places, victims[:, first]] = tensor[*places, sources[:, first]]
