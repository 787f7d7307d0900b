"""adaptkit convert"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import words
from .progress import bar

SERVERS = click.Choice(["vllm", "sglang", "trtllm", "ollama"])
PATH = click.Path(path_type=Path)


@click.command("convert")
@click.argument("source", type=words.SOURCE)
@click.option(
    "-o", "--output", required=True, type=PATH, metavar="OUT", help="Folder to make, or file for formats of one file."
)
@click.option(
    "--to",
    required=True,
    type=words.FORMATS,
    metavar="FORMAT",
    help="safetensors or pytorch, or an adapter format (see adaptkit plugins).",
)
@click.option(
    "--from",
    "from_",
    type=words.FORMATS,
    metavar="FORMAT",
    help="What SOURCE is, where its contents can be read in two ways.",
)
@click.option(
    "--base",
    type=words.SOURCE,
    metavar="PATH",
    help="The model an adapter is for; for shards, the folder with config.json.",
)
@click.option("--config", type=PATH, help="adapter_config.json, for an adapter in shards that has none beside it.")
@click.option("--dtype", type=words.DTYPES, default="keep", show_default=True, help="Numbers to write.")
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="Split into files of at most this size, such as 5GB; SOURCE's files when left out.",
)
@click.option(
    "--for", "for_", type=SERVERS, help="Write what this server reads: one rank, one alpha, nothing it ignores."
)
@click.option(
    "--drop",
    multiple=True,
    metavar="KIND",
    help="Leave out what the target cannot hold: dora, bias, whole, tokens, embedding, conv, experts; several by commas.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT when it exists, in one step at the end.")
@click.option("--dry-run", is_flag=True, help="Show what would be written, and write nothing.")
@words.printing
def command(source: str, output: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Convert an adapter or a whole checkpoint into another format.

    SOURCE is recognised by its contents: a model, an adapter, or the shards that training with FSDP or DeepSpeed left.
    OUT appears when it is complete; a run that was stopped goes on when the same command is run again.

    \b
    Examples:
      adaptkit convert llama-bin/ -o llama/ --to safetensors
      adaptkit convert checkpoint-500/global_step500/ -o my-lora/ --to peft
      adaptkit convert my-lora/ -o served/ --to peft --for vllm
    """
    from ..verbs.convert import convert

    with bar("converting", not quiet and not as_json) as progress:
        done = convert(source, output, progress=progress, **options)
    if as_json:
        click.echo(words.as_json(done))
    elif not quiet:
        _say(done)


def _say(done: Any) -> None:
    shown = _folded(done.notes)
    if shown:
        words.table([("what", "left"), ("where", "left"), ("why", "left")], shown)
    sites = f"{done.sites} modules, " if done.sites else ""
    files = f" in {len(done.files)} file(s)" if done.files else ""
    amount = f", {words.human(done.bytes)}" if done.bytes else ""
    what = f"{done.source_format} to {done.target}: {sites}{done.tensors} tensors{amount}{files}"
    if not done.written:
        click.echo(f"{what} would go into {done.output}; nothing was written")
        return
    again = f", {done.resumed} files were there already" if done.resumed else ""
    click.echo(f"converted {what} into {done.output} ({done.seconds:.1f} s{again})")


def _folded(notes: list[Any]) -> list[tuple[str, str, str]]:
    """One line for notes that differ only in their place."""
    places: dict[tuple[str, str], list[str]] = {}
    for n in notes:
        places.setdefault((n.what, n.text), []).append(n.where)
    return [
        (what, names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""), text)
        for (what, text), names in places.items()
    ]
