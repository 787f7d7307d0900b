"""Two checkpoints of one model, tensor by tensor: which belong together, and how an adapter can hold their difference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import AdaptKitError, Mismatch, quoted, some
from ..store import metamodel
from ..store.arrays import FLOATS
from ..store.checkpoint import Checkpoint, warn
from ..store.conversions import Edge, edges
from ..store.entry import Entry
from ..store.names import PLAIN, direct, prefixes
from ..store.quantised import refuse_quantised
from ..tuners.experts import REGISTERED
from . import checks, layout
from .ends import EMBEDDINGS, HEADS, LABELS, Ends
from .orientation import CONV1D, CONV1D_LEAVES, TURNED_EXPERTS

LINEAR = {"Linear", "Conv1D"}
CONVOLUTIONS = {"Conv1d", "Conv2d", "Conv3d"}
LOOKED_UP = re.compile(r"(?:.*_)?(?:emb|embed|embedding|embeddings|embed_\w+|wte|wpe|shared|relative_attention_bias)")
STACKS = set(REGISTERED) - {"weight", "bias"}  # parameters of expert modules
SAVE_AGAIN = "save it again with transformers"
OF_MODULES = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


@dataclass(frozen=True)
class Pair:
    """One tensor of both models.

    name: the model's name of the parameter.    how: "lora", "experts" (LoRA on a stack of matrices), "whole" (the module is
    saved) or "" for what no adapter holds.
    why: what stands against it, when `how` is "".    turned: it is stored as (in, out).
    """

    name: str
    base: Entry | None
    finetuned: Entry
    how: str
    why: str = ""
    turned: bool = False

    @property
    def module(self) -> str:
        """The path of its site."""
        return self.name if self.how == "experts" else self.name.rpartition(".")[0]

    @property
    def nbytes(self) -> int:
        return self.finetuned.nbytes + (self.base.nbytes if self.base else 0)


@dataclass
class Pairs:
    """All tensors of both models. ends: of the base.   tied: the fine-tuned model's ends are one tensor."""

    found: list[Pair]
    ends: Ends
    tied: bool


def paired(finetuned: Checkpoint, base: Checkpoint) -> Pairs:
    """Both models' tensors, by name. Raises Mismatch for names or shapes that only one of them has."""
    for checkpoint in (finetuned, base):
        refuse_quantised(checkpoint)
        checks.config(checkpoint)
    ends, new = (Ends(c.config, c.entries, layout.notes(c)) for c in (base, finetuned))
    theirs = _by_name(new.entries, ends.entries)
    _same_names(theirs, ends, new)
    if ends.head and ends.head not in theirs:  # the fine-tuned model's head is its embedding
        theirs[ends.head] = new.entries[new.embedding]
    homes = _homes(base.config, {n: e.shape for n, e in ends.entries.items()})
    found = [_pair(n, ends.entries[n], e, homes.get(n), base, ends) for n, e in theirs.items() if n in ends.entries]
    if new.head and not ends.head and not new.tied:
        found.append(Pair(ends.head_name, None, new.entries[new.head], "whole"))
    return Pairs(found, ends, new.tied)


def _by_name(new: Mapping[str, Entry], old: Mapping[str, Entry]) -> dict[str, Entry]:
    """The fine-tuned tensors under the base's names, which may differ by one prefix; in the base's order."""
    known = prefixes(old)
    found = {direct(n, old, known) or n: e for n, e in new.items()}
    if len(found) < len(new):
        raise Mismatch("two tensors of the fine-tuned model have one name in the base, up to a prefix", hint=SAVE_AGAIN)
    order = {n: i for i, n in enumerate(old)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def _same_names(theirs: Mapping[str, Entry], ends: Ends, new: Ends) -> None:
    """The output head may be missing where it is tied."""
    only_new = [n for n in theirs if n not in ends.entries and not (n == new.head and ends.tied)]
    only_old = [n for n in ends.entries if n not in theirs and not (n == ends.head and new.tied)]
    parts = [f"{len(found)} only in the {which} model (first: {some(found, 2)})" for which, found in
             (("fine-tuned", only_new), ("base", only_old)) if found]  # fmt: skip
    if parts:
        raise Mismatch(f"the models have different tensors: {', '.join(parts)}", hint="are both of one family?")


# what holds a tensor


@dataclass(frozen=True)
class _Home:
    """parameter: its name in the model.   owner: the class of its module, None when not known.   why: as in Pair."""

    parameter: str
    owner: str | None = None
    why: str = ""


def _homes(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, _Home]:
    """Names in the model of names on disk, where they may differ."""
    if _as_on_disk(config, shapes):
        return {}
    try:
        wanted, owners = metamodel.module_parameters(config), metamodel.parameter_owner_types(config)
    except AdaptKitError as e:
        warn(f"the names on disk are taken for the model's ({e})")
        return {}
    known = prefixes(shapes)
    found = {d: _Home(p, owners.get(p.rpartition(".")[0])) for p in wanted if (d := direct(p, shapes, known))}
    lost = [p for p in wanted if direct(p, shapes, known) is None]
    for parameter, parts in edges(config, shapes, lost).items() if lost else ():
        for edge in parts:
            plain = len(parts) == 1 and edge == Edge(parameter, edge.disk)
            why = "" if plain else f"it is a part of {quoted(parameter)} in the model"
            found[edge.disk] = _Home(parameter, owners.get(parameter.rpartition(".")[0]), why)
    return found


def _as_on_disk(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether names on disk are surely the model's: no family known, or one that is never renamed, with its prefix."""
    if not config.get("model_type") or not config.get("architectures"):
        return True
    bare = str(config["architectures"][0]).endswith("Model") and "LMHead" not in str(config["architectures"][0])
    return config["model_type"] in PLAIN and bool(bare or prefixes(shapes))


def _pair(name: str, old: Entry, new: Entry, home: _Home | None, base: Checkpoint, ends: Ends) -> Pair:
    home = home or _Home(name)
    how, why = ("", home.why) if home.why else _how(home, old, name, ends)
    if old.shape != new.shape:
        grown = name in (ends.embedding, ends.head) and old.shape[1:] == new.shape[1:]
        if not grown:
            raise Mismatch(
                f"{quoted(name)} is {list(new.shape)} in the fine-tuned model, {list(old.shape)} in the base"
            )
    leaf = home.parameter.removesuffix(".weight").rpartition(".")[2]
    turned = home.owner == "Conv1D" or (base.config.get("model_type") in CONV1D and leaf in CONV1D_LEAVES)
    if how == "experts" and not (old.plain and new.plain):
        how, why = "", "its numbers do not lie in one piece"
    turned = base.config.get("model_type") in TURNED_EXPERTS if how == "experts" else turned and len(old.shape) == 2
    return Pair(home.parameter, old, new, how, why, turned)


def _how(home: _Home, entry: Entry, disk: str, ends: Ends) -> tuple[str, str]:
    """How an adapter can hold a change of a tensor, and why it cannot."""
    path, _, leaf = home.parameter.rpartition(".")
    module = path.rpartition(".")[2]
    if path and leaf in STACKS and len(entry.shape) == 3 and entry.dtype in FLOATS:
        return "experts", ""
    if leaf not in OF_MODULES or not path:
        return "", "it is a parameter that belongs to no module of its own"
    if f"{disk.removesuffix('out_proj.' + leaf)}in_proj_weight" in ends.entries:
        return "", "it is a part of nn.MultiheadAttention"
    if entry.dtype not in FLOATS or leaf != "weight" or len(entry.shape) < 2:
        return "whole", ""
    if len(entry.shape) > 2:
        return ("lora" if _is_ungrouped(home, entry) else "whole"), ""
    end = disk in (ends.embedding, ends.head) or module in (*EMBEDDINGS, *HEADS, *LABELS[:3])
    if home.owner is not None:
        return ("lora" if home.owner in LINEAR and not end else "whole"), ""
    return ("whole" if end or LOOKED_UP.fullmatch(module) else "lora"), ""


def _is_ungrouped(home: _Home, entry: Entry) -> bool:
    """A kernel of one input channel is that of a depthwise convolution, unless the picture is grey."""
    return (home.owner in CONVOLUTIONS or home.owner is None) and (entry.shape[1] > 1 or entry.shape[0] == 1)
