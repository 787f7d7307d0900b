"""adaptkit inspect"""

from __future__ import annotations

from typing import Any

import click

from ..errors import quoted, some
from . import words


@click.command("inspect")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(path: str, as_json: bool) -> None:
    """Say what an adapter is: kind, rank, alpha, targets, tensors, dtype, size, base model.

    Reads settings and headers only. Of a model it says how many tensors of which dtype it has.

    \b
    Example:
      adaptkit inspect my-lora/
    """
    from ..verbs.inspect import inspect

    found = inspect(path)
    if as_json:
        click.echo(words.as_json(found))
        return
    for name, value in _lines(found):
        click.echo(f"{name + ':':<11}{value}")


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
