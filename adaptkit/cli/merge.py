"""adaptkit merge"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from . import words
from .progress import bar


@click.command("merge")
@click.argument("base", type=words.SOURCE)
@click.argument("adapters", type=words.SOURCE, nargs=-1, metavar="ADAPTER...")
@partial(words.output, required=False)
@words.hub
@words.weights
@words.writing
@click.option("--allow-nonfinite", is_flag=True, help="Keep going when a merged number is NaN or infinite.")
@click.option("--dry-run", is_flag=True, help="Show what would change, by how much memory and disk, and write nothing.")
@words.printing
def command(
    base: str, adapters: tuple[str, ...], output: Path | None, dry_run: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Merge adapters into a base model, on files.

    BASE is a model folder or weight file, ADAPTER a folder or file; both may be Hub ids. Given one ADAPTER alone, the
    base is read from its settings. OUT appears when it is complete; a run that was stopped goes on when the same
    command is run again.

    \b
    Examples:
      adaptkit merge llama/ my-lora/ -o merged/
      adaptkit merge llama/ style/ facts/ -o merged/ --weights 0.7,0.3
      adaptkit merge llama/ my-lora/ -o merged/ --dry-run
      adaptkit merge user/my-lora -o merged/
      adaptkit merge user/llama user/my-lora --push user/merged --streaming
    """
    if dry_run:
        _rehearse(base, adapters, output, as_json, options)
        return
    from ..verbs.merge import merge

    with bar("merging", not quiet and not as_json) as progress:
        merged = merge(base, list(adapters) or None, output, progress=progress, **options)
    if as_json:
        click.echo(words.as_json(merged))
    elif not quiet:
        click.echo(sentence("merged", merged))


def sentence(did: str, merged: Any) -> str:
    """One line of result."""
    which = "the update" if len(merged.lost) == 1 else "one adapter's update"
    lost = f", rounding ate {max(merged.lost):.1%} of {which}" if merged.lost else ""
    ids = f", {len(merged.virtual)} virtual tokens in front" if merged.virtual else ""
    again = f", {merged.resumed} files were there already" if merged.resumed else ""
    speed = f"{merged.bytes / max(merged.seconds, 1e-9) / 1e9:.2f} GB/s"
    again += f"; pushed to {merged.pushed}" if merged.pushed and merged.output else ""
    return (
        f"{did} {len(merged.changed)} of {merged.tensors} tensors into {merged.output or merged.pushed} "
        f"({words.human(merged.bytes)}, {merged.seconds:.1f} s, {speed}{lost}{ids}{again})"
    )


def _rehearse(
    base: str, adapters: tuple[str, ...], output: Path | None, as_json: bool, options: dict[str, Any]
) -> None:
    from ..engines.device import checked
    from ..verbs.merge import possible, sensible
    from ..verbs.plan import plan

    sensible(output, *(options[k] for k in ("push", "streaming", "private")))
    possible(options["engine"], options["workers"])
    checked(options["device"])
    known = ("weights", "dtype", "max_shard_size", "workers", "overwrite")
    found = plan(base, list(adapters) or None, output, **{k: options[k] for k in known})
    if as_json:
        click.echo(words.as_json(found))
        return
    columns = [
        ("tensor", "left"),
        ("change", "left"),
        ("shape", "right"),
        ("dtype", "left"),
        ("tensors", "right"),
        ("size", "right"),
    ]
    rows = [
        (g.name, g.what, " x ".join(map(str, g.shape)), g.dtype, str(g.tensors), words.human(g.bytes))
        for g in found.groups
    ]
    words.table(columns, rows)
    click.echo(
        f"{found.changed} of {found.tensors} tensors would change; {words.human(found.copied)} would only be copied"
    )
    if found.rewritten:
        click.echo(f"soft prompt: {', '.join(found.rewritten)} would put its tokens before every text")
    click.echo(f"memory: at most {words.human(found.memory)}")
    room = "fits" if found.fits else "DOES NOT FIT"
    click.echo(
        f"disk:   {words.human(found.bytes)} in {len(found.files)} file(s), {words.human(found.free)} free: {room}"
    )
    click.echo("nothing was written")
