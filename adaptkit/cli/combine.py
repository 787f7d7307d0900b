"""adaptkit combine"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import words
from .counting import counter

METHODS = (
    "svd", "linear", "cat", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip


@click.command("combine")
@click.argument("adapters", type=words.SOURCE, nargs=-1, required=True, metavar="ADAPTER...")
@words.output
@click.option(
    "--method", type=click.Choice(METHODS), default="svd", show_default=True, help="How updates are combined."
)
@words.weights
@click.option("--rank", type=int, metavar="R", help="Rank of an svd method's result; the largest there when left out.")
@click.option("--clamp", type=float, metavar="Q", help="Cut an svd method's factors at this quantile, such as 0.99.")
@click.option("--density", type=float, metavar="D", help="Share of numbers that ties, dare and magnitude_prune keep.")
@click.option("--majority-sign", type=click.Choice(["total", "frequency"]), default="total", show_default=True, help="How ties elects a sign.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of what dare drops.")
@click.option("--take", type=int, metavar="N", help="Keep the Nth adapter's replaced tensors where adapters differ.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where sums are made.")  # fmt: skip
@click.option("--workers", type=int, metavar="N", help="Threads of ties_svd and its kin, with two matrices each; one per core, 8 at most, when left out.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace OUT when it exists, in one step at the end.")
@click.option("--dry-run", is_flag=True, help="Show what would be made, and write nothing.")
@words.printing
def command(adapters: tuple[str, ...], output: Path, dry_run: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Combine several adapters into one.

    svd and cat are exact sums, cut to a rank by svd. The others are those of PEFT; docs/combine.md has the formulas.

    \b
    Examples:
      adaptkit combine style/ facts/ -o both/ --weights 0.7,0.3
      adaptkit combine style/ facts/ -o both/ --method ties_svd --density 0.2 --rank 16
    """
    from ..verbs.combine import combine, rehearsed

    if dry_run:
        made = rehearsed(list(adapters), output, **options)
    else:
        with counter("combining", not quiet and not as_json) as progress:
            made = combine(list(adapters), output, progress=progress, **options)
    if as_json:
        click.echo(words.as_json(made))
    elif not quiet:
        click.echo(_sentence(len(adapters), made, dry_run))


def _sentence(count: int, made: Any, dry: bool) -> str:
    ranks = ", ".join(f"{n} of rank {r}" for r, n in made.ranks.items())
    kept = f"; {len(made.kept)} tensors kept as they are" if made.kept else ""
    did = "would combine" if dry else "combined"
    end = "nothing was written" if dry else f"{made.seconds:.1f} s"
    what = f"{made.sites} site{'s' * (made.sites != 1)}" + (f" ({ranks})" if ranks else "")
    return f"{did} {count} adapter{'s' * (count > 1)} by {made.method} into {made.output}: {what}{kept}; {end}"
