"""Adapters as one .npz file, for people who live in NumPy.

Arrays are called "sites/<module>/<param>" and "whole/<name>"; "adapter" holds the rest as JSON.
"""

import json
import zipfile

import numpy as np

from adaptkit import Adapter, AdaptKitError, Format, Site, registry


class Npz(Format):
    """One .npz file: numpy.load opens it."""

    name = "npz"

    def sniff(self, path):
        return path.suffix == ".npz" and path.is_file() and zipfile.is_zipfile(path)

    def read(self, path):
        try:
            with np.load(path) as f:
                arrays = {key: f[key] for key in f.files}
            said = json.loads(str(arrays["adapter"]))
            sites = {m: (s["tuner"], s["settings"], s["params"]) for m, s in said["sites"].items()}
            params = {m: {k: arrays[f"sites/{m}/{k}"] for k in keys} for m, (_, _, keys) in sites.items()}
            whole = {n: arrays[f"whole/{n}"] for n in said["whole"]}
        except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as e:
            raise AdaptKitError(f"is no adapter that npz wrote ({e})", where=path.name) from None
        made = {m: Site(registry.load("tuners", name)(**more), params[m]) for m, (name, more, _) in sites.items()}
        return Adapter(made, whole, said["meta"], said["about"])

    def write(self, adapter, path):
        arrays = {f"sites/{m}/{k}": array(v, m) for m, s in adapter.sites.items() for k, v in s.params.items()}
        arrays |= {f"whole/{n}": array(v, n) for n, v in adapter.whole.items()}
        sites = {
            m: {"tuner": s.tuner.name, "settings": s.tuner.settings(), "params": list(s.params)}
            for m, s in adapter.sites.items()
        }
        said = json.dumps({"sites": sites, "whole": list(adapter.whole), "meta": adapter.meta, "about": adapter.about})
        with open(path, "wb") as file:  # given a name, NumPy would put .npz after it
            np.savez(file, adapter=said, **arrays)


def array(value, where):
    """A param as NumPy has it. NumPy has no bfloat16, and would write it as bytes without a meaning."""
    if "bfloat16" in str(value.dtype).lower() or str(value.dtype) == "BF16":
        raise AdaptKitError(f"{where} is in bfloat16, which npz cannot hold", hint="convert it with --dtype float32")
    found = np.asarray(value)
    if found.dtype.kind not in "fiub":
        raise AdaptKitError(f"{where} is {value.dtype}, which npz cannot hold")
    return found
