"""adaptkit push"""

from __future__ import annotations

from typing import Any

import click

from . import words
from .progress import bar


@click.command("push")
@click.argument("folder", type=words.SOURCE)
@click.argument("repo", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, when it is new.")
@click.option("--revision", metavar="BRANCH", help="Push to this branch.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--message", metavar="TEXT", help="What the commit says.")
@words.printing
def command(as_json: bool, quiet: bool, **options: Any) -> None:
    """Push a model or an adapter to the Hub, in one commit or one pull request.

    FOLDER is checked first: headers, index, sizes, tokens in text files. A card is written when there is none.

    \b
    Examples:
      adaptkit push merged/ user/llama-style --private
      adaptkit push my-lora/ user/my-lora --create-pr
    """
    from ..verbs.push import push

    with bar("pushing", not quiet and not as_json) as progress:
        pushed = push(progress=progress, **options)
    if as_json:
        click.echo(words.as_json(pushed))
    elif not quiet and not pushed.files:
        click.echo(f"{pushed.url} (all of it was there already)")
    elif not quiet:
        gone = f", {len(pushed.removed)} files of an older model removed" if pushed.removed else ""
        click.echo(f"{pushed.url} ({pushed.files} files, {words.human(pushed.bytes)}{gone})")
