"""A picture of one number for each site: layers down, modules across. Needs matplotlib."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import Mismatch, System, Usage
from .similarity import grid

KINDS = (".png", ".pdf", ".svg")
Panel = tuple[str, dict[str, float | None]]


def checked(file: str | Path) -> Path:
    """The file to draw to. Raises Usage for an ending that is no picture's, Mismatch when matplotlib is missing."""
    file = Path(file)
    if file.suffix.lower() not in KINDS:
        raise Usage(f"{file.suffix or 'no ending'} is not a picture's ending", where=file, hint="write FILE.png")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise Usage("is not a file in a folder that exists", where=file, hint="choose another file")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise Mismatch("drawing needs matplotlib", where="--plot", hint="pip install adaptkit[plot]") from None
    return file


def draw(panels: list[Panel], file: Path, signed: bool) -> None:
    """One heat map for each (title, value by site). signed: cosines, from -1 to 1; otherwise norms, from 0."""
    from matplotlib.figure import Figure

    grids = [(title, *grid(values)) for title, values in panels]
    wide = max((len(kinds) for _, kinds, _, _ in grids), default=1)
    tall = [max(2.5, 0.28 * len(layers) + 2.2) for _, _, layers, _ in grids]
    figure = Figure(figsize=(min(max(5.0, 0.7 * wide + 3), 40), min(sum(tall), 160)), layout="constrained")
    axes = figure.subplots(len(grids), 1, squeeze=False, height_ratios=tall)[:, 0]
    for ax, (title, kinds, layers, table) in zip(axes, grids, strict=True):
        _panel(figure, ax, title, kinds, layers, table, signed)
    save(figure, file)


def _panel(figure: Any, ax: Any, title: str, kinds: list, layers: list, table: list, signed: bool) -> None:
    look = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1} if signed else {"cmap": "viridis", "vmin": 0}
    # the names come from files: no mathematics is read out of their dollar signs
    plain = {"parse_math": False}
    image = ax.imshow(table, aspect="auto", interpolation="nearest", **look)
    ax.set_xticks(range(len(kinds)), [k[-40:] for k in kinds], rotation=45, ha="right", **plain)
    ax.set_yticks(range(len(layers)), ["-" if i is None else str(i) for i in layers])
    ax.set_ylabel("layer")
    ax.set_title(title[-80:], fontsize="medium", **plain)
    figure.colorbar(image, ax=ax, label="cosine" if signed else "norm of the update")


def save(figure: Any, file: Path, dpi: int = 120) -> None:
    """Drawn beside its place, then moved there, so that a picture is whole or absent."""
    beside = file.with_name(f".{file.name}.tmp")
    try:
        figure.savefig(beside, format=file.suffix[1:].lower(), dpi=dpi)
        os.replace(beside, file)
    except OSError as e:
        raise System(f"cannot be written ({e.strerror})", where=file) from e
    finally:
        beside.unlink(missing_ok=True)
