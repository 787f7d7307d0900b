"""adaptkit plugins"""

from __future__ import annotations

import contextlib
import sys

import click

from . import words


@click.command("plugins")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(as_json: bool) -> None:
    """List the installed tuners and formats.

    \b
    Example:
      adaptkit plugins
    """
    from ..verbs.plugins import plugins

    with contextlib.redirect_stdout(sys.stderr):  # a plugin that prints when it is imported must not spoil our output
        found = plugins()
    if as_json:
        click.echo(words.as_json(found))
        return
    words.table(
        [("name", "left"), ("kind", "left"), ("package", "left"), ("about", "left")],
        [(p.name, p.kind, p.package, ("broken: " if p.broken else "") + p.about) for p in found],
    )
