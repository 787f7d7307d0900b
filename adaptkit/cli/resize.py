"""adaptkit resize"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import words
from .counting import counter


@click.command("resize")
@click.argument("adapter", type=words.SOURCE)
@words.output
@click.option("--rank", type=int, metavar="R", help="Rank of every site.")
@click.option(
    "--energy", type=float, metavar="E", help="Or, share of the squared singular values to keep, such as 0.95."
)
@click.option("--max-rank", type=int, metavar="R", help="Largest rank that --energy may choose.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the singular values.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where sums are made.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace OUT when it exists, in one step at the end.")
@words.printing
def command(adapter: str, output: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Give a LoRA another rank, keeping as much of its update as possible.

    \b
    Examples:
      adaptkit resize my-lora/ -o small/ --rank 8
      adaptkit resize my-lora/ -o small/ --energy 0.95 --max-rank 32 --plot values.png
    """
    from ..verbs.resize import resize

    with counter("resizing", not quiet and not as_json) as progress:
        made = resize(adapter, output, progress=progress, **options)
    if as_json:
        click.echo(words.as_json(made))
    elif not quiet:
        _print(made)


def _print(made: Any) -> None:
    columns = [
        ("site", "left"),
        ("old rank", "right"),
        ("new rank", "right"),
        ("energy kept", "right"),
        ("error", "right"),
    ]
    words.table(columns, [(r.name, str(r.old), str(r.new), f"{r.energy:.2%}", f"{r.error:.2e}") for r in made.sites])
    before, after = made.parameters
    drawn = f"; drawn in {made.plot}" if made.plot else ""
    click.echo(
        f"resized {len(made.sites)} sites into {made.output}: {before:,} -> {after:,} numbers, "
        f"{made.energy:.2%} of the energy kept, relative error {made.error:.2e}{drawn} ({made.seconds:.1f} s)"
    )
