"""The command line: one command per verb. Commands turn words into arguments, call the verb and print what it returns."""

from __future__ import annotations

import signal
from typing import NoReturn


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code."""
    # Ctrl-C while modules are still being imported ends the process without a traceback; app.main handles it from there
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from . import app

    app.main(args)
