"""adaptkit unmerge"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import words
from .merge import sentence
from .progress import bar


@click.command("unmerge")
@click.argument("merged", type=words.SOURCE)
@click.argument("adapters", type=words.SOURCE, nargs=-1, required=True, metavar="ADAPTER...")
@words.output
@words.weights
@words.writing
@words.printing
def command(merged: str, adapters: tuple[str, ...], output: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Take adapters out of a merged model, on files.

    A 16-bit model comes back within about a rounding of each number. DoRA, token rows and tensors that were replaced
    cannot be taken out.

    \b
    Example:
      adaptkit unmerge merged/ my-lora/ -o back/
    """
    from ..verbs.unmerge import unmerge

    with bar("unmerging", not quiet and not as_json) as progress:
        done = unmerge(merged, list(adapters), output, progress=progress, **options)
    if as_json:
        click.echo(words.as_json(done))
    elif not quiet:
        done.lost = []
        click.echo(sentence("restored", done))
