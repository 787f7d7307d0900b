"""The picture of `resize`: every site's singular values, and what is kept of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import quoted
from . import heatmap

FLOOR = 1e-6  # of the largest value: what lies below is rounding
PALETTE = "viridis"


def draw(report: Any, file: Path) -> None:
    """One line per site, coloured by kind of module, each divided by its largest value; below, the ranks that were kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    top, low = figure.subplots(2, 1, height_ratios=[2, 1])
    groups = sorted({_group(r.name) for r in report.sites})
    colours = _colours(groups)
    _values(top, report, colours)
    _ranks(low, report, colours)
    figure.suptitle(f"Singular values of {len(report.sites)} sites; {report.energy:.2%} of the energy kept")
    heatmap.save(figure, file, dpi=150)


def _group(name: str) -> str:
    return name.rpartition(".")[2]


def _colours(groups: list[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    palette = colormaps["tab10" if len(groups) <= 10 else PALETTE]
    return {g: palette(i if len(groups) <= 10 else i / (len(groups) - 1)) for i, g in enumerate(groups)}


def _values(axes: Any, report: Any, colours: dict[str, Any]) -> None:
    labelled: set[str] = set()
    thin = 1.2 if len(report.sites) < 20 else 0.6
    for row in report.sites:
        group = _group(row.name)
        peak = row.values[0] if row.values else 0.0
        heights = [max(v / peak, FLOOR) for v in row.values] if peak else []
        label = None if group in labelled else quoted(group).replace("$", r"\$").lstrip("_")
        labelled.add(group)
        axes.plot(range(1, len(heights) + 1), heights, color=colours[group], lw=thin, alpha=0.6, label=label)
        if heights:
            axes.plot([row.new], [heights[row.new - 1]], "o", color=colours[group], ms=4 * thin, alpha=0.8)
    axes.set_yscale("log")
    axes.set_ylabel("singular value / largest of the site")
    axes.set_xlabel("index (dot: the last one kept)")
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False, ncols=1 + len(colours) // 24)


def _ranks(axes: Any, report: Any, colours: dict[str, Any]) -> None:
    at = range(1, len(report.sites) + 1)
    axes.bar(at, [r.new for r in report.sites], color=[colours[_group(r.name)] for r in report.sites], width=0.9)
    axes.step(at, [r.old for r in report.sites], where="mid", color="0.3", lw=0.8, label="before")
    axes.set_ylabel("rank")
    axes.set_xlabel("site, in the order of the table")
    axes.set_xlim(0.4, len(report.sites) + 0.6)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)
