"""Draw the plots that open the pages of results, from the tables in these pages.

    python docs/plot_tables.py

It makes no figure of its own: results.md gives the share of correct images, performance.md the tokens per second.
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
LEARNED = "learned for the budget"
RIVALS = ("linear", "h2o:num_recent=30", "h2o", "streaming-llm")
POLICIES = (LEARNED, "fitted:score=learned", "online", "fitted", "ssd", *RIVALS)
CONTROLS = ("ssd", "labels at run time", "random-1", "margin", "inverted", "streaming-llm")


def rows_of(page: str, after: str) -> list[list[str]]:
    """Cells of the first table below `after` in a page, without its header, formatting removed."""
    text = (DOCS / page).read_text("utf-8")
    text = text[text.index(after) :]
    lines = re.search(r"(?:^\|.*\|\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in lines]


def plot_shares(policies: tuple[str, ...], file: Path) -> None:
    """Share of correct images against the budget, a line for each policy, with bands of 1.96 standard errors."""
    shares: dict[str, dict[float, tuple[float, float]]] = {}  # policy -> budget in % -> share, standard error
    for policy, budget, *_, share, error, _ in rows_of("results.md", "Every policy at every budget, by kind"):
        shares.setdefault(policy, {})[float(budget.rstrip("%"))] = float(share), float(error)
    others = [("online", budget, share) for budget, share, *_ in rows_of("results.md", "## Without a head map")]
    for budget, captions, share, *_ in rows_of("results.md", "### Learned for 10% and 15%"):
        others += [(LEARNED, budget, share)] if captions.startswith("of the tables") else []
    for policy, budget, share in others:  # of 600 images each
        error = (float(share) * (1 - float(share)) / 600) ** 0.5
        shares.setdefault(policy, {})[float(budget.split("%")[0])] = float(share), error
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    ((full, error),) = shares["full"].values()
    axes.axhspan(full - 1.96 * error, full + 1.96 * error, color="tab:gray", alpha=0.3, linewidth=0)
    axes.axhline(full, color="black", linestyle="--", label="full cache")
    for policy, marker in zip(policies, "osD^vPX*h", strict=False):
        budgets, points = zip(*sorted(shares[policy].items()), strict=True)
        means, errors = zip(*points, strict=True)
        (line,) = axes.plot(budgets, means, marker=marker, markersize=5, label=policy)
        low, high = ([m + sign * 1.96 * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(budgets, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel="budget: visual tokens a head may hold, in % of the grid", ylabel="correct images")
    axes.set_xticks([10, 15, 20, 30, 50], ["10", "15", "20", "30", "50"])
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, title="bands: 95%")
    figure.savefig(file, dpi=150)


def plot_speeds(file: Path) -> None:
    """A bar for each cache, compressed ones in another colour, with the slowest and the fastest round."""
    names, speeds, ranges = [], [], []
    for cache, _, _, of_eight, *_ in reversed(rows_of("performance.md", "### Tokens per second")):
        speed, low, high = map(int, re.findall(r"\d+", of_eight))
        names.append(cache)
        speeds.append(speed)
        ranges.append((speed - low, high - speed))
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    colors = ["tab:orange" if name.startswith("ssd") else "tab:gray" for name in names]
    bars = axes.barh(names, speeds, xerr=list(zip(*ranges, strict=True)), color=colors, capsize=2)
    axes.bar_label(bars, padding=8)
    axes.set_xlabel("tokens/s: 8 images with guidance,\nrandom decoder, two CPU cores")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    plot_shares(POLICIES, DOCS / "results-budget.png")
    plot_shares(CONTROLS, DOCS / "results-controls.png")
    plot_speeds(DOCS / "speed-cpu.png")
