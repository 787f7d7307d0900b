"""adaptkit pull"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import words
from .progress import bar


@click.command("pull")
@click.argument("repo", metavar="USER/NAME[@REVISION]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Folder to make; the cache when left out."
)
@click.option("--overwrite", is_flag=True, help="Replace DIR when it exists, in one step at the end.")
@words.printing
def command(as_json: bool, quiet: bool, **options: Any) -> None:
    """Pull a model or an adapter from the Hub: config, one kind of weights and tokenizer.

    Prints the folder. What was cut goes on when the same command is run again.

    \b
    Examples:
      adaptkit pull user/my-lora
      adaptkit pull user/llama@v1.0 -o llama/
      adaptkit pull user/many/style -o style/
    """
    from ..verbs.pull import pull

    with bar("fetching", not quiet and not as_json) as progress:
        pulled = pull(progress=progress, **options)
    if as_json:
        click.echo(words.as_json(pulled))
    elif not quiet:
        click.echo(str(pulled.path))
