"""adaptkit extract"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import quoted, some
from . import words
from .progress import bar


@click.command("extract")
@click.argument("finetuned", type=words.SOURCE)
@click.argument("base", type=words.SOURCE)
@words.output
@click.option("--rank", type=int, metavar="R", help="Rank of every site.")
@click.option(
    "--energy", type=float, metavar="SHARE", help="Or: of the squared singular values, how much each site keeps."
)
@click.option("--max-rank", type=int, metavar="R", help="The largest rank that --energy may choose.")
@click.option("--target-modules", metavar="REGEX|LIST", help="Only these modules: a pattern for whole names, or names.")
@click.option("--layers", metavar="0-3,7", help="Only these layers.")
@click.option("--partial", is_flag=True, help="Leave out what changed and is not selected, or cannot be held.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Numbers of the factors.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where matrices are decomposed.",
)
@click.option("--workers", type=int, metavar="N", help="Threads, with one matrix each; one per core when left out.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random start.")
@click.option("--overwrite", is_flag=True, help="Replace OUT when it exists, in one step at the end.")
@click.option("--dry-run", is_flag=True, help="Show which modules would be looked at, and write nothing.")
@words.printing
def command(finetuned: str, base: str, output: Path, dry_run: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Extract a LoRA from a fine-tuned model and its base, on files.

    Matrices of layers become LoRA sites; embeddings, heads, norms and biases that changed are saved whole. OUT is a
    folder in PEFT's format.

    \b
    Examples:
      adaptkit extract my-finetune/ llama/ -o lora/ --rank 16
      adaptkit extract my-finetune/ llama/ -o lora/ --energy 0.9 --max-rank 64
      adaptkit extract my-finetune/ llama/ -o lora/ --rank 8 --layers 0-3 --partial
    """
    from ..verbs.extract import extract, rehearsed

    if dry_run:
        _rehearsal(rehearsed(finetuned, base, output, **options), as_json)
        return
    with bar("extracting", not quiet and not as_json) as progress:
        found = extract(finetuned, base, output, progress=progress, **options)
    if as_json:
        click.echo(words.as_json(found))
    elif not quiet:
        _report(found)


def _report(found: Any) -> None:
    columns = [("site", "left"), ("rank", "right"), ("error", "right"), ("energy", "right"), ("norm", "right")]
    worst = sorted(found.sites, key=lambda s: -s.error)[:5]
    rows = [(s.name, str(s.rank), f"{s.error:.3%}", f"{s.energy:.3%}", f"{s.norm:.3g}") for s in worst]
    if rows:
        words.table(columns, rows, f"the {len(rows)} sites with the largest error of {len(found.sites)}")
    if found.whole:
        click.echo(f"saved whole: {some(found.whole, 6)}")
    if found.left:
        click.echo(f"left out: {some(found.left, 6)}")
    click.echo(
        f"extracted {len(found.sites)} sites into {found.output} ({words.human(found.bytes)}, {found.seconds:.1f} s): "
        f"{found.error:.3%} of the update's norm is not in them"
    )


def _rehearsal(found: Any, as_json: bool) -> None:
    if as_json:
        click.echo(words.as_json(found))
        return
    for name in found.lora:
        click.echo(quoted(name))
    for reason in found.unable:
        click.echo(f"refused if it changed: {reason}")
    click.echo(
        f"{len(found.lora)} modules would become sites if they changed, {len(found.whole)} tensors be saved whole"
    )
    click.echo(f"factors: at most {words.human(found.bytes)}; matrices in memory: at most {words.human(found.memory)}")
    click.echo("nothing was written")
