"""The page of a report: figures and tables of an analysis, rendered with the template `report.html.j2`.

It formats numbers that were measured elsewhere, and writes no file. Jinja2 escapes all text.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ssd_cache.analysis.attention import HeadAttention, draw_first_rows, draw_queries
from ssd_cache.analysis.concentration import draw_columns, draw_curves
from ssd_cache.analysis.plotting import WIDTH, check_packages, to_png
from ssd_cache.analysis.retention_map import draw_heads, draw_over_picture
from ssd_cache.analysis.scores import HeadScores, draw_scores
from ssd_cache.analysis.study import Analysis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {"h2o": "H2O", "streaming-llm": "StreamingLLM"}


@dataclass(frozen=True)
class Embedded:
    """A figure embedded in the page, with its alternative text and caption."""

    source: str
    alt: str
    caption: str
    is_wide: bool


def render(analysis: Analysis) -> str:
    """Render the analysis as an HTML page."""
    check_packages()
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("report.html.j2").read_text("utf-8"))
    scores, concentration = analysis.scores, analysis.concentration
    model = analysis.conditions["model"]
    return template.render(
        model=model,
        prompt=analysis.conditions["prompt"],
        conditions=[(key.replace("_", " "), _shown(value)) for key, value in analysis.conditions.items()],
        num_spatial=int(scores.is_spatial.sum()),
        num_heads=scores.is_spatial.numel(),
        score_name=None if scores.name is None else scores.name.replace("_", " "),
        threshold=scores.threshold,
        score_figures=[
            _embed(draw_scores(shown), f"Heat map of {shown.name} by layer and KV head, spatial heads marked.", caption)
            for shown, caption in _shown_scores(scores)
        ],
        score_names=[name.replace("_", " ") for name in scores.all],
        heads=_head_rows(analysis),
        attention=[_attention_part(analysis, attention) for attention in analysis.attention],
        sentence=concentration.sentence(model),
        curves=concentration.curves,
        concentration_figures=[
            _embed(
                draw_curves(concentration),
                "Squared difference of K and of V by visual token, a line for each kind of head.",
                "By visual token, in raster order, mean over pictures.",
            ),
            _embed(
                draw_columns(concentration),
                "The same differences summed by column of the grid, mean column 1, margin columns shaded.",
                "By column of the grid; a thin line is one picture.",
            ),
        ],
        step=analysis.conditions["step"],
        retention=[_retention_part(analysis, policy) for policy in analysis.retention],
    )


def _shown_scores(scores: HeadScores) -> list[tuple[HeadScores, str]]:
    """The score behind the labels, and the other scores that the paper discusses."""
    captions = {
        "window_mass": "Share of a head's visual attention on the tokens of the last grid row and one more.",
        "margin": "Share of a head's visual attention on the first and last column.",
    }
    shown = [(scores, captions.get(scores.name or "", ""))]
    for name in [name for name in captions if name in scores.others]:
        other = replace(scores, name=name, values=scores.others[name], threshold=None)
        shown.append((other, captions[name]))
    return shown


def _embed(figure: Figure, alt: str, caption: str) -> Embedded:
    data = base64.b64encode(to_png(figure)).decode()
    return Embedded(f"data:image/png;base64,{data}", alt, caption, figure.get_figwidth() > WIDTH)


def _kind(analysis: Analysis, layer: int, head: int) -> str:
    return "spatial" if analysis.scores.is_spatial[layer, head] else "semantic"


def _head_rows(analysis: Analysis) -> list[dict[str, Any]]:
    shares = analysis.concentration.head_shares
    return [
        {
            "layer": layer,
            "head": head,
            "kind": _kind(analysis, layer, head),
            "scores": [values[layer, head].item() for values in analysis.scores.all.values()],
            "keys": shares["keys"][layer, head].item(),
            "values": shares["values"][layer, head].item(),
        }
        for layer in range(analysis.scores.is_spatial.shape[0])
        for head in range(analysis.scores.is_spatial.shape[1])
    ]


def _attention_part(analysis: Analysis, attention: HeadAttention) -> dict[str, Any]:
    name = f"layer {attention.layer}, head {attention.head}"
    rows, columns = attention.grid
    queries = []
    for index, query in enumerate(attention.queries):
        row, column = attention.strongest(index)
        queries.append(
            {
                "query": f"{query // columns}, {query % columns}",
                "prompt": attention.prompt_share[index].item(),
                "margins": attention.weights[index].reshape(rows, columns)[:, [0, -1]].sum().item(),
                "strongest": f"{row}, {column}",
                "weight": attention.weights[index].max().item(),
            }
        )
    kind = _kind(analysis, attention.layer, attention.head)
    return {
        "name": name,
        "kind": kind,
        "queries": queries,
        "figures": [
            _embed(
                draw_queries(attention),
                f"Attention of {name}, {kind}, over the grid, at {len(queries)} visual tokens.",
                "Weights over the grid at the outlined tokens; grey is still to come.",
            ),
            _embed(
                draw_first_rows(attention),
                f"Attention of {name}, {kind}, by query and key, over the first grid rows.",
                f"By query and key. A line {columns} tokens below the diagonal is the token right above.",
            ),
        ],
    }


def _retention_part(analysis: Analysis, policy: str) -> dict[str, Any]:
    retention, memory = analysis.retention[policy], analysis.memory[policy]
    own, _, words = analysis.conditions["policy"].rpartition(": ")
    title = f"SSD, {words}" if policy == own else TITLES.get(policy, policy)
    heads = [(attention.layer, attention.head) for attention in analysis.attention]
    return {
        "title": title,
        "held": retention.mean_held,
        "lost": retention.lost_share,
        "spatial": retention.margin_share("spatial"),
        "semantic": retention.margin_share("semantic"),
        "ratio": memory.full_cache / memory.key_value,
        "figures": [
            _embed(
                draw_over_picture(retention, analysis.pictures[policy], heads),
                f"{title}: the picture, what two heads hold of it, and how many heads hold each token.",
                f"{title}. Dark: dropped. Grey: still to come.",
            ),
            _embed(
                draw_heads(retention),
                f"{title}: a small grid for every head with the tokens that it holds.",
                f"{title}, every head.",
            ),
        ],
    }


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, list | tuple) and len(value) == 2:
        return f"{value[0]} x {value[1]}"
    return f"{value:g}" if isinstance(value, float) else str(value)
