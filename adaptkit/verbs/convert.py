"""convert: the same numbers in another format. Every tensor of the source is written, or named in the report."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections import Counter as Counted
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import registry
from ..adapter import Adapter
from ..engines.containers import CONTAINERS, index, index_name
from ..engines.copying import copied
from ..engines.local import Local
from ..engines.plan import Plan
from ..errors import AdaptKitWarning, Mismatch, Usage, quoted, some
from ..formats.base import Note
from ..formats.base import read as read_adapter
from ..formats.base import write as write_adapter
from ..formats.cast import cast
from ..formats.fold import kinds
from ..formats.servers import SERVERS, prepared
from ..store import dcp_safetensors, disk
from ..store.checkpoint import Checkpoint, open_checkpoint, read_weights, unchanged
from ..store.destination import checked
from ..store.hub import called, place
from ..store.output import Output
from ..store.shards import open_shards
from .detect import ADAPTERS, ENDINGS, SHARDED, UNKNOWN, WHOLE, container, detect, strange
from .inputs import Counter, dtype_of, size_of
from .merge import as_text, check_pickles, write_text
from .receipt import about

Progress = Callable[[int, int], None]
PARTS = {"bias", "dora"}  # kinds that are one tensor of a site and not the site
ENDS = tuple(end for ends in ENDINGS.values() for end in ends)


@dataclass
class Converted:
    """What a conversion did.

    sites: adapted modules, 0 for whole checkpoints.    tensors: written.    bytes: of weights.    seconds: it took.
    notes: whatever was folded, padded, dropped, kept or renamed on the way.
    """

    output: Path
    source_format: str
    target: str
    sites: int
    tensors: int
    notes: list[Note] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0
    files: list[str] = field(default_factory=list)
    resumed: int = 0
    written: bool = True


@dataclass
class _Wish:
    """What was asked for, checked."""

    source: Path
    output: Path
    to: str
    source_format: str
    base: Path | None
    config: Path | None
    dtype: str | None
    limit: int | None
    server: str | None
    drop: tuple[str, ...]
    overwrite: bool
    dry_run: bool
    progress: Progress | None
    start: float


def convert(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    from_: str | None = None,
    base: str | Path | None = None,
    config: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    for_: str | None = None,
    drop: Sequence[str] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Convert an adapter or a whole checkpoint into another format.

    source: a file or folder; what it is shows in its contents, from_ says it where they can be read in two ways.
    output: a folder, or a file for formats of one file; it appears when it is complete.
    to: "safetensors" or "pytorch" change the container; the name of an adapter format writes an adapter.
    base: the model an adapter is for, or the folder with config.json for shards that have none beside them.
    config: adapter_config.json, for adapters in shards that have none beside them.
    dtype: "float32", "bfloat16" or "float16"; None keeps each tensor's.    max_shard_size: "5GB"; None keeps the files.
    for_: "vllm", "sglang", "trtllm" or "ollama": write what that server reads.    drop: kinds of parts to leave out.
    dry_run: report, and write nothing.    progress: called with (bytes, of bytes).

    Raises Usage, Corrupt, Mismatch, Unsafe or System, before a byte is written wherever that can be known.
    """
    start = time.monotonic()
    path = place(source, progress=progress)
    found = from_ or detect(path)
    wish = _Wish(
        path, Path(output), _target(to, for_), _known(found, "--from"), place(base, "model", progress=progress) if base else None,
        Path(config) if config else None, dtype_of(dtype), size_of(max_shard_size), for_, tuple(kind for words in drop for kind in words.split(",")), overwrite,
        dry_run, progress, start,
    )  # fmt: skip
    if not path.exists():
        raise Usage("not found", where=path, hint="give a folder or a file")
    for given, option in ((wish.base, "--base"), (wish.config, "--config")):
        if given is not None and not given.exists():
            raise Usage("not found", where=option)
    return _whole(wish) if wish.to in CONTAINERS else _adapter(wish)


def _target(to: str, server: str | None) -> str:
    if server is not None and server not in SERVERS:
        raise Usage(f"{quoted(server)!r} is not one of {', '.join(SERVERS)}", where="--for")
    to = _known(to, "--to")
    if to in SHARDED:
        raise Usage(f"{to} can only be read", where="--to", hint="use safetensors")
    if server is not None and to not in SERVERS[server].formats:
        raise Usage(f"{server} reads {' or '.join(SERVERS[server].formats)}", where="--to")
    return to


def _known(name: str, option: str) -> str:
    names = [*registry.names("formats"), *WHOLE, *(SHARDED if option == "--from" else ())]
    if name not in names:
        raise Usage(f"{quoted(name)!r} is not one of {', '.join(names)}", where=option)
    return name


# whole checkpoints


def _whole(wish: _Wish) -> Converted:
    for given, option in ((wish.drop, "--drop"), (wish.config, "--config")):
        if given:
            raise Usage(f"is for adapters, --to {wish.to} copies every tensor", where=option)
    checkpoint = opened(wish.source, wish.source_format)
    base = wish.base if wish.base is None or wish.base.is_dir() else wish.base.parent
    plan, said = copied(checkpoint, CONTAINERS[wish.to], wish.dtype, wish.limit, base)
    plan.options = {"verb": "convert", "to": wish.to, "dtype": wish.dtype, "max_shard_size": wish.limit}
    notes = [Note(*n) for n in said] + [Note("dropped", wish.source.name, text) for text in checkpoint.notes]
    notes += _inside(checkpoint)
    tensors = len(plan.targets) + len(plan.aliases)
    done = Converted(wish.output, wish.source_format, wish.to, 0, tensors, notes, plan.nbytes, files=list(plan.files))
    inputs = [wish.source, *([wish.base] if wish.base else [])]
    if wish.dry_run:
        Output(wish.output, plan=plan.fingerprint(), need=plan.need, inputs=inputs, overwrite=wish.overwrite)
        done.written = False
        return done
    _write(plan, wish, done, inputs)
    done.seconds = time.monotonic() - wish.start
    return done


def opened(path: Path, kind: str) -> Checkpoint:
    """Whatever holds tensors, as a checkpoint: a model, shards, or an adapter's folder."""
    if kind in SHARDED:
        return open_shards(path)
    if kind not in WHOLE:
        file = _only_file(path, kind)
        entries, metadata = read_weights(file)
        return Checkpoint(path, file.parent, entries, [file], {file.name: metadata})
    if path.is_file() and path.parent.is_dir() and path in dcp_safetensors.files(path.parent):
        raise Usage("holds slices of tensors, as other files beside it", where=path, hint="give the folder")
    return open_checkpoint(path)


def _only_file(path: Path, kind: str) -> Path:
    """The file with the tensors of an adapter. Raises Usage for a format that has a container of its own."""
    if path.is_file() and container(path):
        return path
    if path.is_dir():
        held = [path / n for n in ADAPTERS if (path / n).is_file()]
        found = held[:1] or [p for p in sorted(path.iterdir()) if p.name.endswith(ENDS) and p.is_file()]
        if len(found) == 1:
            return found[0]
    text = f"is an adapter ({kind}), --to safetensors and pytorch copy tensors that lie in one file of either kind"
    hint = "choose an adapter's format with --to" + (", or give one of its files" if path.is_dir() else "")
    raise Usage(text, where=path, hint=hint)


def _inside(checkpoint: Checkpoint) -> list[Note]:
    """A word on an adapter among the tensors of shards."""
    mine = _peft().adapted(checkpoint.entries) if checkpoint.shards else []
    text = f"{len(mine)} tensors are an adapter's; --to peft writes them as one"
    return [Note("kept", checkpoint.path.name, text)] if mine else []


def _write(plan: Plan, wish: _Wish, done: Converted, inputs: list[Path]) -> None:
    local = Local(None, Counter(plan.nbytes, wish.progress))
    out = Output(
        wish.output,
        plan=plan.fingerprint(),
        need=plan.need,
        inputs=inputs,
        overwrite=wish.overwrite,
        files=len(plan.files),
    )
    if not plan.checkpoint.shards:
        check_pickles(plan.checkpoint, later=[t.source for t in plan.targets if t.copied])
    with out:
        local.write(plan, out)
        _beside(plan, wish.to, out)
        unchanged(plan.stamps)
        done.notes += [
            Note("rounded", n, f"{c:,} numbers became zero in {wish.dtype}") for n, c in local.flushed.items()
        ]
        done.resumed = out.resumed
        out.publish({**about(plan.options, None, [wish.source]), "adapters": [], "source": called(wish.source)})
    if total := sum(local.flushed.values()):
        text = f"{total:,} numbers in {len(local.flushed)} tensors became zero in {wish.dtype}"
        warnings.warn(text, AdaptKitWarning, stacklevel=2)
    for text in local.warnings:
        warnings.warn(text.replace("the base holds", "holds"), AdaptKitWarning, stacklevel=2)


def _beside(plan: Plan, to: str, out: Output) -> None:
    """Index, config and the files that go with the model."""
    for source, name in plan.extras:
        if not out.done(name) and not (name == "config.json" and plan.config is not None):
            out.copy(source, name)
    if plan.config is not None:
        write_text(out, "config.json", as_text(plan.config))
    if table := index(plan.files, plan.aliases):
        write_text(out, index_name(plan.checkpoint, CONTAINERS[to]), as_text(table))


# adapters


def _adapter(wish: _Wish) -> Converted:
    if wish.limit is not None:
        raise Usage("is for whole checkpoints", where="--max-shard-size")
    adapter, notes = _read(wish)
    if wish.server:
        adapter, more = prepared(adapter, wish.server, wish.drop, wish.base)
        notes += more
    if wish.dtype:
        notes += cast(adapter, wish.dtype)
    done = Converted(wish.output, wish.source_format, wish.to, 0, 0, notes)
    _place(wish)
    if wish.dry_run:
        more, done.bytes = _rehearsed(adapter, wish)
    else:
        more = _written(adapter, wish)
    done.sites, done.tensors = _counted(adapter, wish, more)
    done.notes += more
    if wish.dry_run:
        done.written = False
        return done
    done.bytes = _size(wish.output)
    done.seconds = time.monotonic() - wish.start
    return done


def _counted(adapter: Adapter, wish: _Wish, notes: list[Note]) -> tuple[int, int]:
    """The sites and tensors of an adapter without those that the writer left out."""
    lost = Counted(n.where or "the whole model" for n in notes if n.what == "dropped")
    gone = {p for p, s in adapter.sites.items() if lost[p or "the whole model"] and (kinds(s) - PARTS) & set(wish.drop)}
    left = {p: s for p, s in adapter.sites.items() if p not in gone}
    whole = sum(name not in lost for name in adapter.whole)
    return len(left), whole + sum(len(s.params) - lost[p] for p, s in left.items())


def _read(wish: _Wish) -> tuple[Adapter, list[Note]]:
    """The adapter, and what was left of the source."""
    if wish.source_format not in (*WHOLE, *SHARDED):
        if wish.config and wish.source_format == "peft":
            return _peft().settled(wish.source, _settings_in(wish.config)), []
        if wish.config:
            raise Usage(f"is for adapters under PEFT's names, this one is {wish.source_format}", where="--config")
        return read_adapter(wish.source, wish.source_format, base=wish.base), []
    checkpoint = opened(wish.source, wish.source_format)
    _of_peft(checkpoint, wish)
    adapter, left = _peft().taken(checkpoint, _settings(wish, checkpoint))
    notes = [Note("dropped", wish.source.name, text) for text in checkpoint.notes]
    if left:
        notes.append(Note("dropped", wish.source.name, f"{len(left)} tensors of the base model ({some(left)})"))
    return adapter, notes


def _of_peft(checkpoint: Checkpoint, wish: _Wish) -> None:
    """Raises Mismatch for an adapter of another program, Usage for a model."""
    mine = _peft().adapted(checkpoint.entries)
    program, odd = strange(checkpoint.entries)
    if program and not (mine and (checkpoint.shards or wish.config or program == UNKNOWN)):
        text = f"holds an adapter of {program}, which no installed format reads ({some(odd, 1)})"
        hint = "say what it is with --from, if one of adaptkit plugins fits"
        raise Mismatch(text, where=wish.source, hint=hint)
    if not mine:
        extract = "adaptkit extract makes an adapter of one"
        hint = "--to safetensors or pytorch converts models" if checkpoint.shards else extract
        raise Usage("this is a model, not an adapter", where=wish.source, hint=hint)


def _peft() -> Any:
    """The format whose names trainers give to an adapter's tensors."""
    return registry.load("formats", "peft")()


def _settings(wish: _Wish, checkpoint: Checkpoint) -> Path:
    if wish.config:
        return _settings_in(wish.config)
    for folder in (checkpoint.root, wish.source, wish.base):
        if folder is not None and (folder / "adapter_config.json").is_file():
            return folder / "adapter_config.json"
    raise Usage(
        "holds an adapter, but no adapter_config.json lies beside it, and without that its scale is unknown",
        where=wish.source,
        hint="give it with --config",
    )


def _settings_in(path: Path) -> Path:
    """The file itself, or the one in a folder."""
    file = path / "adapter_config.json" if path.is_dir() else path
    if not file.is_file():
        raise Usage("holds no adapter_config.json", where="--config")
    return file


def _place(wish: _Wish) -> None:
    """Where an adapter may be written: raises Usage before anything is."""
    suffix = registry.load("formats", wish.to).suffix
    if suffix and not wish.output.name.endswith(suffix):
        raise Usage(f"{wish.to} is one file", where=wish.output, hint=f"call it {wish.output.name}{suffix}")
    inputs = [given for given in (wish.source, wish.base, wish.config) if given is not None]
    if not suffix:
        checked(wish.output, inputs, wish.overwrite)
    elif wish.output.is_dir():
        raise Usage("is a folder", where=wish.output, hint=f"{wish.to} is one file: choose another name")
    elif os.path.lexists(wish.output):
        home = wish.output.resolve()
        if mine := next((given for given in inputs if given.resolve() in (home, *home.parents)), None):
            raise Usage(f"belongs to the input {quoted(mine)}", where=wish.output, hint="choose another output")
        if not wish.overwrite:
            raise Usage("exists", where=wish.output, hint="choose another output or use --overwrite")


def _rehearsed(adapter: Adapter, wish: _Wish) -> tuple[list[Note], int]:
    """What writing would say, and how many bytes it would write: only the writer knows, so it writes for nobody."""
    with tempfile.TemporaryDirectory(prefix="adaptkit-") as folder:
        spot = Path(folder) / wish.output.name
        return write_adapter(adapter, spot, wish.to, **_how(wish)), _size(spot)


def _how(wish: _Wish) -> dict[str, Any]:
    return {"base": wish.base, "drop": () if wish.server else wish.drop}


def _written(adapter: Adapter, wish: _Wish) -> list[Note]:
    """Write, beside the old output where there is one, and swap the two at the end."""
    options = _how(wish)
    if not wish.overwrite or not os.path.lexists(wish.output):
        return write_adapter(adapter, wish.output, wish.to, **options)
    fresh = wish.output.with_name(f".{wish.output.stem}.adaptkit-new{wish.output.suffix}")
    if os.path.lexists(fresh):  # left by a run that was killed before the two were swapped
        disk.delete(fresh)
    try:
        notes = write_adapter(adapter, fresh, wish.to, **options)
        _swap(fresh, wish.output)
    finally:
        if os.path.lexists(fresh):
            disk.delete(fresh)
    disk.sync_folder(wish.output.absolute().parent)
    return notes


def _swap(fresh: Path, old: Path) -> None:
    """Put a new file or folder where the old one is, in one step."""
    if not fresh.is_dir():
        os.replace(fresh, old)
    elif not disk.exchange(fresh, old):
        hint = "delete it first, or choose another output"
        raise Mismatch("cannot be replaced in one step on this file system", where=old, hint=hint)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files if f.is_file())
