"""Options that several commands share, and the ways results are printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..errors import Usage, quoted

DTYPES = click.Choice(["keep", "float32", "bfloat16", "float16"])


class Source(click.ParamType):
    """A folder, a file or a Hub id; shells complete paths."""

    name = "text"

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class Formats(click.ParamType):
    """A format by its name, which the verb checks; shells complete those that are installed."""

    name = "format"

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        from .. import registry

        names = [*registry.names("formats"), "safetensors", "pytorch"]
        return [CompletionItem(n) for n in names if n.startswith(incomplete)]


SOURCE, FORMATS = Source(), Formats()


class Weights(click.ParamType):
    """ "0.7,0.3" as two numbers."""

    name = "w1,w2,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return [float(part) for part in value.split(",")]
        except ValueError:
            raise Usage(
                f"{quoted(value)!r} is not a list of numbers", where="--weights", hint="write it as 0.7,0.3"
            ) from None


def output(f: Callable, required: bool = True) -> Callable:
    return click.option(
        "-o", "--output", required=required, type=click.Path(path_type=Path), metavar="OUT", help="Folder to make."
    )(f)


def hub(f: Callable) -> Callable:
    """Options of a merge that goes to the Hub."""
    for option in reversed((
        click.option("--push", metavar="USER/NAME", help="Push the result to the Hub, too; a branch is given as USER/NAME@BRANCH."),
        click.option("--private", is_flag=True, help="Make that repository private, when it is new."),
        click.option("--streaming", is_flag=True, help="Shard by shard from the Hub to the Hub, without OUT; needs --push."),
    )):  # fmt: skip
        f = option(f)
    return f


def weights(f: Callable) -> Callable:
    return click.option(
        "--weights", type=Weights(), help="How much of each adapter's update is taken, such as 0.7,0.3."
    )(f)


def writing(f: Callable) -> Callable:
    """Options of everything that writes a model."""
    for option in reversed((
        click.option("--dtype", type=DTYPES, default="keep", show_default=True, help="Numbers to write."),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where sums are made."),
        click.option("--max-shard-size", metavar="SIZE", help="Split into files of at most this size, such as 5GB; the base's files when left out."),
        click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="Where the work runs."),
        click.option("--workers", type=int, metavar="N", help="Threads; one per core when left out."),
        click.option("--overwrite", is_flag=True, help="Replace OUT when it exists, in one step at the end."),
    )):  # fmt: skip
        f = option(f)
    return f


def printing(f: Callable) -> Callable:
    f = click.option("--quiet", is_flag=True, help="Print nothing but errors.")(f)
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(f)


def as_json(value: Any) -> str:
    """A result as JSON, by the names of its fields."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False)


def plain(value: Any) -> Any:
    """Dataclasses as dictionaries, paths as text."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def human(count: float) -> str:
    """Bytes as people say them: human(2_400_000_000) -> "2.40 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def table(columns: list[tuple[str, str]], rows: list[tuple], title: str | None = None) -> None:
    """Print a table. columns: (heading, "left" or "right")."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for heading, side in columns:
        made.add_column(heading, justify=side, overflow="fold", no_wrap=False)
    for row in rows:
        made.add_row(*(quoted(cell) for cell in row))
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, emoji=False, width=160)
    with console.capture() as drawn:  # rich has its own way with closed pipes
        console.print(made)
    click.echo(drawn.get(), nl=False)
