"""Writes the results of a preparation: the head map, its model card with a plot, and a page about the run.

`report.html.j2` has the text of the page. Jinja2 escapes all values. Images are embedded, and nothing is loaded from a
network.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssd_cache.analysis.plotting import new_figure, to_png
from ssd_cache.head_map.card import FIDELITY_HEADS, PLOT_NAME, card, fidelity_rows, png
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.io.writing import write_files
from ssd_cache.preparing.state import StateFolder
from ssd_cache.runs.metering import Cost
from ssd_cache.runs.plan import Plan, duration, memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.html"


def usage(output: Path) -> str:
    """The lines of Python that use the map in a folder."""
    return f'with ssd_cache.enable(model, "{output}"):\n    tokens = model.generate(**inputs, generation_mode="image")'


def write_outputs(output: Path, head_map: HeadMap, plan: Plan, folder: StateFolder) -> None:
    """Write the report, the model card and its plot, then the map; raises OSError, or HeadMapError for the map."""
    plot = png(head_map)
    write_files(
        {
            output / REPORT: render(output, head_map, plan, folder, plot).encode(),
            output / "README.md": card(head_map, output.name).encode(),
            output / PLOT_NAME: plot,
        }
    )
    head_map.save_pretrained(output)


def render(output: Path, head_map: HeadMap, plan: Plan, folder: StateFolder, plot: bytes) -> str:
    """The page as HTML."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("report.html.j2").read_text("utf-8"))
    rows = fidelity_rows(head_map)
    return template.render(
        model=plan.model,
        device=plan.device,
        num_spatial=int(head_map.is_spatial.sum()),
        num_heads=head_map.is_spatial.numel(),
        labels=_embedded(plot),
        curve=_embedded(to_png(_draw_curve(head_map.profile["fidelity"]["curve"]))) if rows else None,
        fidelity_heads=FIDELITY_HEADS,
        fidelity_rows=rows,
        learned=head_map.profile.get("learning", {}).get("held_out") if head_map.learned is not None else None,
        stage_rows=_stage_rows(plan, folder.costs),
        condition_rows=[[name.replace("_", " "), str(value)] for name, value in folder.settings.items()],
        usage=usage(output),
    )


def _stage_rows(plan: Plan, costs: Mapping[str, Cost]) -> list[list[Any]]:
    """Images, estimated and measured cost of every stage."""
    rows = []
    for estimate in plan.estimates:
        expected, measured = estimate.cost, costs.get(estimate.stage, Cost())
        times, peaks = zip(*((duration(c.seconds), memory(c.peak_bytes)) for c in (expected, measured)), strict=True)
        rows.append([estimate.stage, estimate.num_images or "", *times, *peaks])
    return rows


def _draw_curve(curve: list[dict[str, Any]]) -> Figure:
    """KL by budget, with standard errors."""
    figure = new_figure(2.6)
    axes = figure.subplots()
    budgets = [100 * point["budget"] for point in curve]
    errors = [point["kl_standard_error"] or 0.0 for point in curve]
    axes.errorbar(budgets, [point["kl"] for point in curve], errors, marker="o", color="#0072B2", capsize=3)
    axes.set(xlabel="budget: slots of a head, in % of the grid", ylim=(0, None), xlim=(0, None))
    axes.set_title("KL(full || this cache), nats per token", fontsize=10, loc="left")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _embedded(content: bytes) -> str:
    """A PNG as the address of an image."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
