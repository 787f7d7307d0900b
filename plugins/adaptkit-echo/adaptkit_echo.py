"""The smallest plugin: a tuner that changes nothing, and a format that says on stderr what it was given.

A .echo file holds one module name in each line.
"""

import sys
from dataclasses import dataclass

from adaptkit import Adapter, AdaptKitError, Format, Site, Tuner


@dataclass(frozen=True)
class Echo(Tuner):
    """W' = W"""

    name = "echo"
    arrays = "any"  # no torch function in sight

    def init(self, base):
        return {}

    def weight(self, W, p):
        return W

    def inverse(self, p):
        return self, p


class Echoes(Format):
    """Module names, one in each line of a .echo file; says what it was given."""

    name = "echo"

    def sniff(self, path):
        return path.suffix == ".echo"

    def read(self, path):
        modules = path.read_text().split()
        say(f"read {path.name}: {len(modules)} modules")
        return Adapter({module: Site(Echo(), {}) for module in modules})

    def write(self, adapter, path):
        for module, site in adapter.sites.items():
            say(f"site {module or '(the whole model)'}: {site.tuner}")
            for letter, value in site.params.items():
                say(f"  {letter} {list(value.shape)} {value.dtype}")
        for name, value in adapter.whole.items():
            say(f"whole {name} {list(value.shape)} {value.dtype}")
        for key, text in adapter.meta.items():
            say(f"meta {key}: {text}")
        if adapter.whole or adapter.meta or any(s.tuner != Echo() for s in adapter.sites.values()):
            raise AdaptKitError("format 'echo' holds nothing but module names", hint="write it as peft")
        path.write_text("\n".join(adapter.sites))


def say(text):
    print(f"echo: {text}", file=sys.stderr)
