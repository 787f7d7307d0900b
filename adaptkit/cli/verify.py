"""adaptkit verify"""

from __future__ import annotations

from typing import Any

import click

from . import words
from .progress import bar


@click.command("verify")
@click.argument("merged", type=words.SOURCE)
@click.option("--base", type=words.SOURCE, required=True, help="The model that the adapters were merged into.")
@click.option(
    "--adapter",
    "adapters",
    type=words.SOURCE,
    required=True,
    multiple=True,
    help="An adapter; give the option once for each.",
)
@words.weights
@click.option("--sample", type=int, metavar="N", help="Compare only N tensors, spread over the model.")
@words.printing
def command(merged: str, adapters: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> int:
    """Say whether a model is the merge of adapters into a base, by computing it again.

    Exit code 0 when it is, 4 when it is not. The merge may be another program's.

    \b
    Example:
      adaptkit verify merged/ --base llama/ --adapter my-lora/
    """
    from ..verbs.verify import described, verify

    with bar("verifying", not quiet and not as_json) as progress:
        found = verify(merged, adapters=list(adapters), progress=progress, **options)
    if as_json:
        click.echo(words.as_json(found))
    elif not found.ok:
        from ..errors import Mismatch

        raise Mismatch(described(found), where=merged)
    elif not quiet:
        lost = f"; rounding ate {found.lost:.1%} of the update" if found.lost else ""
        click.echo(described(found) + lost)
    return 0 if found.ok else 4
