"""The group of commands, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click

from ..errors import AdaptKitError, AdaptKitWarning, quoted

# name -> first line of help: the commands are imported when they are called, so that --help answers at once
COMMANDS = {
    "merge": "Merge adapters into a base model, on files.",
    "unmerge": "Take adapters out of a merged model, on files.",
    "verify": "Say whether a model is the merge of adapters into a base, by computing it again.",
    "extract": "Extract a LoRA from a fine-tuned model and its base, on files.",
    "combine": "Combine several adapters into one.",
    "resize": "Give a LoRA another rank, keeping as much of its update as possible.",
    "convert": "Convert an adapter or a whole checkpoint into another format.",
    "export-onnx": "Export a model as ONNX graphs, with adapters merged into it on the way.",
    "inspect": "Say what an adapter is: kind, rank, alpha, targets, tensors, dtype, size, base model.",
    "targets": "Show which modules of a model a selection hits.",
    "pull": "Pull a model or an adapter from the Hub: config, one kind of weights and tokenizer.",
    "push": "Push a model or an adapter to the Hub, in one commit or one pull request.",
    "plugins": "List the installed tuners and formats.",
}
# commands that go on where an earlier run was stopped
RESUMED = {"merge", "unmerge", "convert", "export-onnx", "pull", "push"}
COMPLETE = "_ADAPTKIT_COMPLETE"  # what shells ask through; README says how to switch it on
TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")


class Commands(click.Group):
    """Imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f".{name.replace('-', '_')}", __package__).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as e:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            raise click.UsageError(
                f"{e.message.rstrip('.')}" + (f" Did you mean {near[0]!r}?" if near else "")
            ) from None


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="adaptkit", message="adaptkit %(version)s")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def cli(debug: bool) -> None:
    """From a trained adapter to a model that ships.

    \b
    Example:
      adaptkit merge BASE ADAPTER -o OUT
    """


class Terminated(BaseException):
    """SIGTERM: unwinds like Ctrl-C, so that nothing is left half-written."""


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code."""
    args = sys.argv[1:] if args is None else args
    if wanted := os.environ.get(COMPLETE):
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(cli, {}, "adaptkit", COMPLETE, wanted))
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is imported; our threads are the parallelism
    if not re.search(r"//([\w-]+\.)*(huggingface|hf)\.co(/|$)", os.environ.get("HF_ENDPOINT", "//huggingface.co")):
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # of Hubs elsewhere few speak Xet, and the client does not ask
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's way to keep Ctrl-C from a background job
        signal.signal(signal.SIGINT, _interrupt)
    code = run(args)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        code = code or 141
    except OSError as e:
        code = code or _failed(e)
    if code == 141:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains when it flushes at its end
    sys.exit(code)


def _interrupt(*_: Any) -> NoReturn:
    """Ctrl-C unwinds; a second one does not wait for that. Output survives both, as it survives a power cut."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    raise KeyboardInterrupt


def run(args: list[str]) -> int:
    """The exit code of a command line; a failure is one line on stderr."""
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    with warnings.catch_warnings(record=True) as noticed:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", AdaptKitWarning)
        previous = _on_sigterm()
        try:
            # not cli.main, which has its own ways with interrupts and closed pipes
            with cli.make_context("adaptkit", list(args)) as context:
                code = cli.invoke(context)
            code = code if isinstance(code, int) else 0
        except BaseException as e:
            if debug:
                print(TOKEN.sub("hf_...", traceback.format_exc()), file=sys.stderr)
            return _failed(e, resumed=bool(args) and args[0] in RESUMED)
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
    for text in dict.fromkeys(str(w.message) for w in noticed if issubclass(w.category, AdaptKitWarning)):
        _say(f"warning: {text}")
    return code


def _failed(e: BaseException, resumed: bool = False) -> int:
    """Print one line for an exception; its exit code. resumed: whether the command goes on when it is run again."""
    again = "run the same command again to go on" if resumed else "nothing was written"
    e = _stop_within(e)
    if isinstance(e, AdaptKitError):
        e.where = _named(e.where)
        _say(f"error: {e}")
        return e.code
    if isinstance(e, click.exceptions.Exit):
        return e.exit_code
    if isinstance(e, click.Abort | KeyboardInterrupt):
        _say(f"interrupted{_progress()}; {again}")
        return 130
    if isinstance(e, Terminated):
        _say(f"terminated{_progress()}; {again}")
        return 143
    if isinstance(e, click.exceptions.NoArgsIsHelpError):
        click.echo(e.format_message())
        return e.exit_code
    if isinstance(e, click.ClickException):
        _say(f"error: {e.format_message()}")
        return e.exit_code
    if isinstance(e, BrokenPipeError):
        return 141
    if isinstance(e, MemoryError):
        _say("error: memory: not enough of it; nothing was published; use fewer --workers")
        return 6
    if isinstance(e, OSError):
        _say(f"error: {quoted(e.filename or 'system')}: {quoted(e.strerror or e)}")
        return 6
    if isinstance(e, SystemExit):
        return e.code if isinstance(e.code, int) else 1
    _say(
        f"error: adaptkit: a bug of ours, {type(e).__name__}: {quoted(e)}; please report it with the output of --debug"
    )
    return 1


def _stop_within(e: BaseException) -> BaseException:
    """The signal that an error comes from, else the error: before Python 3.12, __set_name__ wraps whatever it raises."""
    inner: BaseException | None = e
    for _ in range(16):  # chains are short, and may be circles
        if isinstance(inner, KeyboardInterrupt | Terminated):
            return inner
        inner = inner and (inner.__cause__ or inner.__context__)
    return e


def _named(where: Any) -> Any:
    """A file of the Hub's cache by its id, which says more than where the cache keeps it."""
    if where is None or "models--" not in str(where):
        return where
    from ..store.hub import Ref, origin

    found = origin(Path(where))
    return f"hub: {Ref(found.id, None, found.sub)}" if found else where


def _progress() -> str:
    from . import progress

    return progress.reached()


def _say(text: str) -> None:
    if sys.stderr is None:
        return
    try:
        print(TOKEN.sub("hf_...", text.replace("\n", " ")), file=sys.stderr, flush=True)
    except (BrokenPipeError, OSError):
        return  # nobody is listening any more


def _on_sigterm() -> Any:
    def stop(*_: Any) -> NoReturn:
        raise Terminated

    try:
        return signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        return None
