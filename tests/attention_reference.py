"""What head statistics mean, in plain loops and float64, from whole attention matrices. Imports nothing of the package.

`weights` is `[rows][kv_heads][groups][queries][prompt + queries]`, nested lists; a query sees its own token.
"""

from __future__ import annotations

import math


def kept_tokens(kind, level, own_scores, token, state):
    """The tokens that a head holds at the query of `token`; `state` is its list of them, changed in place."""
    num_slots, buffer, num_recent, num_sinks = level
    if len(state) == num_slots:
        if kind == "spatial":
            ranked = sorted(old for old in state if old >= num_sinks)
        else:
            candidates = [old for old in state if num_sinks <= old < token - num_recent]
            ranked = sorted(candidates, key=lambda old: (own_scores[old], old))
        for old in ranked[:buffer]:
            state.remove(old)
    state.append(token)
    return state


def retained(weights_of_row, num_prompt, kind, level):
    """Sum over queries `t >= num_slots` and groups of the retained attention, and how many these are."""
    groups, queries = len(weights_of_row), len(weights_of_row[0])
    state, scores, total, count = [], [0.0] * queries, 0.0, 0
    for token in range(queries):
        kept_tokens(kind, level, scores, token, state)
        for group in range(groups):
            row = weights_of_row[group][token]
            mass = sum(row[:num_prompt]) + sum(row[num_prompt + old] for old in state)
            for old in state:
                scores[old] += row[num_prompt + old] / mass
            if token >= level[0]:
                total, count = total + mass, count + 1
    return total, count


def statistics(weights, num_prompt, grid, levels, window):
    """Every share of one layer's KV heads, as lists over them, from all the rows given."""
    rows, columns = grid
    queries = len(weights[0][0][0])
    first_counted = min(2, rows - 1) * columns
    results = []
    for head in range(len(weights[0])):
        found = {"offsets": [[0.0] * (2 * columns - 1) for _ in range(rows)]}
        inside = visual = prompt = margin = chance = entropy = 0.0
        counted = sampled = 0
        top, top_visual = [0.0] * len(levels), [0.0] * len(levels)
        for batch_row in weights:
            for group in batch_row[head]:
                for token in range(first_counted, queries):
                    row = group[token]
                    seen = row[num_prompt : num_prompt + token + 1]
                    counted += 1
                    prompt += sum(row[:num_prompt])
                    visual += sum(seen)
                    cells_at_margin = 0
                    for other, weight in enumerate(seen):
                        at_margin = other % columns in (0, columns - 1)
                        cells_at_margin += at_margin
                        margin += weight * at_margin
                        inside += weight * (other > token - window)
                        up = token // columns - other // columns
                        right = other % columns - token % columns
                        found["offsets"][up][right + columns - 1] += weight
                    chance += sum(seen) * cells_at_margin / (token + 1)
                    grid_row = token // columns
                    in_row = min(columns, queries - grid_row * columns)
                    if token % columns == grid_row % in_row:
                        sampled += 1
                        entropy -= sum(w * math.log(w) for w in row if w > 0)
                        for index, level in enumerate(levels):
                            if token >= level[0]:
                                top[index] += sum(sorted(seen)[-level[0] :])
                                top_visual[index] += sum(seen)
        found["offsets"] = [[value / visual for value in line] for line in found["offsets"]]
        found |= {"window": inside / visual, "prompt": prompt / counted, "margin": margin / visual}
        found |= {"chance": chance / visual, "entropy": entropy / sampled}
        found["top"] = [part / whole if whole else 1.0 for part, whole in zip(top, top_visual, strict=True)]
        for kind in ("spatial", "semantic"):
            found[kind] = []
            for level in levels:
                pairs = [retained(batch_row[head], num_prompt, kind, level) for batch_row in weights]
                total, count = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
                found[kind].append(total / count if count else 1.0)
        results.append(found)
    return results
