"""adaptkit targets"""

from __future__ import annotations

from typing import Any

import click

from ..errors import quoted
from . import words


@click.command("targets")
@click.argument("model", type=words.SOURCE)
@click.option(
    "--target-modules", metavar="REGEX|LIST", help="A pattern for whole names, or names such as q_proj,v_proj."
)
@click.option("--layers", metavar="0-3,7", help="Only these layers.")
@click.option("--layers-pattern", metavar="NAME", help="What stands before the layer's number, such as layers.")
@click.option("--exclude-modules", metavar="REGEX|LIST", help="Leave these out.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(model: str, as_json: bool, **options: Any) -> None:
    """Show which modules of a model a selection hits.

    \b
    Example:
      adaptkit targets llama/ --target-modules '.*\\.(q|v)_proj' --layers 0-3
    """
    from ..verbs.targets import targets

    found = targets(model, **options)
    if as_json:
        click.echo(words.as_json(found))
        return
    for t in found:
        click.echo(f"{quoted(t.name)}  {t.dtype} {' x '.join(map(str, t.shape))}")
    click.echo(f"{len(found)} module{'s' if len(found) != 1 else ''}", err=True)
