"""adaptkit plugins"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

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
        [
            ("name", "left"),
            ("kind", "left"),
            ("package", "left"),
            ("about", "left"),
            ("can", "left"),
            ("cannot hold", "left"),
        ],
        [(p.name, p.kind, p.package, _about(p), ", ".join(p.can), "; ".join(p.cannot)) for p in found],
    )


def _about(plugin: Any) -> str:
    return ("broken: " if plugin.broken else "") + plugin.about
