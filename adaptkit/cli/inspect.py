"""adaptkit inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import quoted, some
from . import words


@click.command("inspect")
@click.argument("paths", type=words.SOURCE, nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--base", type=words.SOURCE, metavar="PATH", help="The model it is for, for formats that need it to be read (gguf)."
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw a heat map, layers by modules.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(paths: tuple[str, ...], base: str | None, plot: Path | None, as_json: bool) -> None:
    """Say what an adapter is: kind, rank, alpha, targets, tensors, dtype, size, base model.

    Reads settings and headers only. Of a model it says how many tensors of which dtype it has. Of two or more adapters
    it says how far their updates overlap: cosines, norms, and the angles between the spaces that they write to (columns)
    and read from (rows). The picture shows the norm of the update, or the cosine of each pair.

    \b
    Examples:
      adaptkit inspect my-lora/
      adaptkit inspect my-lora/ --plot norms.png
      adaptkit inspect style/ facts/ --plot overlap.png
    """
    from ..verbs.inspect import inspect

    found = inspect(list(paths), base=base, plot=plot)
    if as_json:
        click.echo(words.as_json(found))
        return
    if len(paths) > 1:
        for pair in found.pairs:
            _overlap(pair)
        return
    for name, value in _lines(found):
        click.echo(f"{name + ':':<11}{value}")


def _overlap(pair: Any) -> None:
    """One pair of adapters: a line for each site, then what holds for all."""
    columns = [
        ("site", "left"),
        *((name, "right") for name in ("cosine", "|A|", "|B|", "shared columns", "shared rows")),
    ]
    rows = [
        (s.name, _cosine(s.cosine), *(f"{n:.3g}" for n in s.norms), *_shares(s))
        for s in pair.sites
    ]  # fmt: skip
    a, b = (quoted(Path(p).name) for p in pair.adapters)
    if rows:
        words.table(columns, rows, f"A = {a}, B = {b}")
    for name, only in ((a, pair.only[0]), (b, pair.only[1])):
        if only:
            click.echo(f"only in {name}: {_places(only)}")
    for why in dict.fromkeys(pair.uncompared.values()):
        click.echo(f"not compared: {_places([n for n, w in pair.uncompared.items() if w == why])}: {why}")
    if pair.uncompared and not rows:
        click.echo(f"{a} and {b}: nothing could be compared")
        return
    norms = " and ".join(f"{n:.4g}" for n in pair.norms)
    click.echo(f"{a} and {b}: cosine {_cosine(pair.cosine)}, norms {norms}, {len(pair.sites)} modules compared")


def _places(names: list[str]) -> str:
    return some([n or "the whole model" for n in names], 6)


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _shares(site: Any) -> tuple[str, str]:
    if not site.columns:
        return "-", "-"
    return f"{site.shared_columns:.1%}", f"{site.shared_rows:.1%}"


def _lines(found: Any) -> list[tuple[str, str]]:
    dtypes = ", ".join(f"{n} {d}" for d, n in found.dtypes.items())
    lines = [("kind", f"{found.kind}   (format {found.format})")]
    if found.rank is not None:
        lines.append(("rank", f"{found.rank}   alpha {_number(found.alpha)}"))
    if found.targets:
        lines.append(
            ("targets", f"{found.sites} modules: " + ", ".join(f"{quoted(t)} x {n}" for t, n in found.targets.items()))
        )
    if found.layers:
        lines.append(("layers", f"{found.layers[0]} to {found.layers[-1]}, {len(found.layers)} of them"))
    if found.whole:
        lines.append(("replaced", some(found.whole, 6)))
    lines.append(("tensors", f"{found.tensors} ({dtypes}), {found.parameters:,} numbers, {words.human(found.bytes)}"))
    if found.base:
        lines.append(("base", quoted(found.base)))
    return lines + [("setting", f"{k} = {quoted(v)}") for k, v in found.settings.items()]


def _number(value: Any) -> str:
    return str([float(v) for v in value]) if isinstance(value, list) else f"{value:g}"
