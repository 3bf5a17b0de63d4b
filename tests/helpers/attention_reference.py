"""What head statistics mean, in plain loops and float64, from whole attention matrices. Imports nothing of the package.

`weights` is `[rows][kv_heads][groups][queries][prompt + queries]`, nested lists; a query sees its own token.
"""

from __future__ import annotations

import torch


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


def statistics(weights, num_prompt, grid, levels, window, num_before=0):
    """Every share of one layer's KV heads, as lists over them, from all the rows given.

    `num_before`: tokens of previews, which come before the grid's own.
    """
    rows, columns = grid
    queries = len(weights[0][0][0])
    first_counted = num_before + min(2, rows - 1) * columns
    results = []
    for head in range(len(weights[0])):
        found = {"offsets": [[0.0] * (2 * columns - 1) for _ in range(rows)]}
        inside = visual = prompt = margin = 0.0
        counted = 0
        for batch_row in weights:
            for group in batch_row[head]:
                for token in range(first_counted, queries):
                    row = group[token]
                    seen = row[num_prompt : num_prompt + token + 1]
                    counted += 1
                    prompt += sum(row[:num_prompt])
                    visual += sum(seen)
                    for other, weight in enumerate(seen):
                        inside += weight * (other > token - window)
                        if other < num_before:
                            continue
                        above, column = divmod(other - num_before, columns)
                        margin += weight * (column in (0, columns - 1))
                        up = (token - num_before) // columns - above
                        right = column - (token - num_before) % columns
                        found["offsets"][up][right + columns - 1] += weight
        found["offsets"] = [[value / visual for value in line] for line in found["offsets"]]
        found |= {"window": inside / visual, "prompt": prompt / counted, "margin": margin / visual}
        for kind in ("spatial", "semantic"):
            found[kind] = []
            for level in levels:
                pairs = [retained(batch_row[head], num_prompt, kind, level) for batch_row in weights]
                total, count = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
                found[kind].append(total / count if count else 1.0)
        results.append(found)
    return results


def as_tuple(level):
    return level.num_slots, level.buffer, level.num_recent, level.num_sinks


def compare(measured, layers, num_prompt, window, rows):
    """Hold `HeadStatistics` to the loops.

    `layers`: attention of the rows that `rows` names, `[rows, kv_heads, groups, queries, prompt + queries]` each.
    """
    levels, num_before = [as_tuple(level) for level in measured.levels], measured.layout.num_draft_tokens
    for layer, weights in enumerate(layers):
        expected = statistics(weights.double().tolist(), num_prompt, measured.layout.grid, levels, window, num_before)
        found = {
            "offsets": measured.offset_share(rows),
            "window": measured.window_mass(window, rows),
            "prompt": measured.prompt_share(rows),
            "margin": measured.margin_share(rows),
        }
        for kind in ("spatial", "semantic"):
            found[kind] = torch.stack([measured.retained(kind, slots, rows) for slots, *_ in levels], dim=-1)
        for name, values in found.items():
            wanted = torch.tensor([head[name] for head in expected], dtype=torch.float64)
            torch.testing.assert_close(values[layer], wanted, atol=1e-5, rtol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023
