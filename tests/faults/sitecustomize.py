"""Python imports this file by itself when its folder is on PYTHONPATH: the command then runs as it is, on a bad system.

FAULTS is a list of  call,what,when,path  separated by semicolons, such as  pwrite,EIO,2+,.safetensors.tmp
    call: a function of the os module, or `import`.     when: the how-manieth such call, with + for all from there on.
    what: an errno, a signal that the process gets before the call, `short` (1000 bytes are written) or `slow20` (ms).
    path: how the path of the call's first argument ends, or the name of the module.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time


class Fault:
    """Counts the calls that it is about, and spoils those it should."""

    def __init__(self, call: str, what: str, when: str, path: str = ""):
        self.call, self.what, self.path = call, what, path
        self.first, self.forever = int(when.rstrip("+")), when.endswith("+")
        self.count, self.lock = 0, threading.Lock()

    def hits(self, path: str) -> bool:
        if not path.endswith(self.path):
            return False
        with self.lock:
            self.count += 1
            return self.count == self.first or self.forever and self.count > self.first

    def spoil(self, args: tuple) -> tuple:
        """The arguments that the real call gets, if it is made at all."""
        if self.what.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.what))
        elif self.what.startswith("slow"):
            time.sleep(int(self.what[4:]) / 1000)
        elif self.what == "short":
            return args[0], memoryview(args[1])[:1000], *args[2:]
        else:
            code = getattr(errno, self.what)
            raise OSError(code, os.strerror(code), *[a for a in args[:1] if not isinstance(a, int)])
        return args

    def wrapped(self, function):
        def call(*args, **options):
            if self.hits(path_of(args[0])):
                args = self.spoil(args)
            return function(*args, **options)

        return call

    def find_spec(self, name: str, *_) -> None:
        """As a finder of modules: sees every import, and finds nothing."""
        if name == self.path and self.hits(name):
            self.spoil(())


def path_of(argument: object) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{argument}") if isinstance(argument, int) else os.fsdecode(argument)
    except (OSError, TypeError):
        return ""


for text in filter(None, os.environ.pop("FAULTS", "").split(";")):
    fault = Fault(*text.split(","))
    if fault.call == "import":
        sys.meta_path.insert(0, fault)
    else:
        setattr(os, fault.call, fault.wrapped(getattr(os, fault.call)))
