"""A soft prompt becomes rows of the vocabulary: E' = [E; P], and the tokenizer puts their ids before every text.

The new rows of an untied head are zero; those of a tied one are P. Either way generation_config.json suppresses the
new ids, so that they are read and never written. Beam search takes its log-softmax before tokens are suppressed:
renormalize_logits takes the mass of the new ids out again. A head with a bias needs none of it: NEVER leaves no mass.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import registry
from ..adapter import Adapter, Site
from ..errors import AdaptKitError, Corrupt, Mismatch, quoted, some
from ..store import tokenizer as tokens
from ..store.arrays import NUMPY, load, shape_of
from ..store.checkpoint import Checkpoint, read_json, warn
from ..store.metamodel import meta_model, module_parameters
from ..store.probe import row_scale
from .ends import EMBEDDINGS, HEADS, PLAIN_HEAD, Ends, with_vocabulary
from .plan import Change, Target, addable, matrix

NEVER = -1e4  # the bias of an id that must not be written: its probability is zero in every dtype
GENERATION = "generation_config.json"
COUNTED = ("max_length", "min_length")  # generation settings that count what was read


@dataclass(frozen=True)
class Prompt:
    """The soft prompt of one adapter.

    index: which adapter.    about: its settings.    P: (tokens, width)
    """

    site: Site
    index: int
    name: str
    about: dict[str, Any]

    @property
    def P(self) -> Any:
        return self.site.params["P"]


def split(adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[list[Adapter], Prompt | None]:
    """The adapters without their soft prompt, and that. Raises Mismatch for two, or for one that is weighted."""
    left, found = [], []
    for i, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        site = adapter.sites.get("")
        if site is None or not getattr(site.tuner, "embeds", False):
            left.append(adapter)
            continue
        name = Path(adapter.meta.get("path", "adapter")).name
        if weight != 1:
            text = f"a soft prompt is tokens, which cannot be weighted by {weight:g}"
            raise Mismatch(text, where=name, hint="give it weight 1")
        found.append(Prompt(site, i, name, adapter.about))
        left.append(replace(adapter, sites={path: s for path, s in adapter.sites.items() if path}))
    if len(found) > 1:
        names = some([p.name for p in found])
        raise Mismatch(f"two soft prompts ({names}), and a model has one beginning", hint="merge one of them")
    return left, found[0] if found else None


class Bake:
    """What a soft prompt does to the model that the other adapters leave.

    texts: files beside the weights, by name, as they will be.     ids: of the virtual tokens.
    """

    def __init__(self, checkpoint: Checkpoint, ends: Ends, prompt: Prompt):
        self.checkpoint, self.ends, self.prompt = checkpoint, ends, prompt
        self.texts: dict[str, bytes] = {}
        self.ids = range(0)

    def apply(
        self, targets: dict[str, Target], config: dict[str, Any], extras: list[tuple[Path, str]]
    ) -> tuple[dict[str, Any], list[tuple[Path, str]]]:
        """Let the targets grow; the config and the copied files as they become. Raises Mismatch where it is not exact."""
        try:
            return self._apply(targets, config, extras)
        except AdaptKitError as e:
            raise e.at(self.prompt.name) from None

    def _apply(
        self, targets: dict[str, Target], config: dict[str, Any], extras: list[tuple[Path, str]]
    ) -> tuple[dict[str, Any], list[tuple[Path, str]]]:
        embedding = self._embedding(targets, config)
        scale = row_scale(config)
        folder = tokens.folder_of(extras)
        found = tokens.loaded(folder, config) if folder else None
        count = shape_of(self.prompt.P)[0]
        first = embedding.shape[0]
        if found and found.size > first:
            text = f"the tokenizer has {found.size:,} ids, the embedding only {first:,} rows"
            raise Mismatch(text, hint="save the base with an embedding as long as its tokenizer")
        grown = with_vocabulary(config, first + count)
        self._only_ends_grow(targets, config, grown, first + count)
        self.ids = range(first, first + count)
        self._grow(targets, embedding, first, scale)
        extras = self._tokenizer(found, first, count, extras)
        never = self.ends.head_name.replace("weight", "bias") in targets
        self._generation(config, list(self.ids), renormalize=not never)
        return grown, [(file, name) for file, name in extras if name not in self.texts]

    # -- is it exact?

    def _embedding(self, targets: dict[str, Target], config: dict[str, Any]) -> Target:
        """The input embedding, when the model is of a kind that this is right for."""
        if not config:
            raise Mismatch("a soft prompt needs a model folder, with its config.json")
        self._refuse_other_kinds(config)
        t = targets.get(self.ends.embedding or "")
        if t is None:
            raise Mismatch("the checkpoint has no input embedding that could hold virtual tokens")
        addable(t)
        shape, wanted = shape_of(self.prompt.P), self.prompt.site.tuner.tokens
        if len(shape) != 2 or shape[1] != t.shape[1]:
            raise Mismatch(f"virtual tokens {list(shape)}, the embedding {quoted(t.name)} is {list(t.shape)}")
        if shape[0] != wanted:
            raise Mismatch(f"num_virtual_tokens is {wanted}, the file holds {shape[0]}", where="adapter_config.json")
        return t

    def _refuse_other_kinds(self, config: dict[str, Any]) -> None:
        kinds = [str(a) for a in config.get("architectures") or ()]
        task = self.prompt.about.get("task_type") or "CAUSAL_LM"
        if config.get("is_encoder_decoder") or task == "SEQ_2_SEQ_LM":
            why = "its decoder shares the embedding, and only the encoder may read virtual tokens"
        elif task != "CAUSAL_LM":
            why = "its outputs are read at positions that virtual tokens move, which every program would have to know"
        elif not kinds or not kinds[0].endswith(PLAIN_HEAD):
            why = "only a plain causal language model is known to read ids as PEFT gives it embeddings"
        else:
            return
        what = f"{quoted(kinds[0]) if kinds else 'a model of unknown architecture'} ({task})"
        raise Mismatch(f"a soft prompt cannot be baked into {what}: {why}", hint="serve it as an adapter")

    def _only_ends_grow(self, targets: dict[str, Target], old: dict[str, Any], new: dict[str, Any], rows: int) -> None:
        """Raises Mismatch when a larger vocabulary changes more of the model than its two ends."""
        before, after = module_parameters(old), module_parameters(new)
        changed = [n for n in after if before.get(n) != after[n]]
        leaves = {n: n.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2] for n in changed}
        if others := [n for n in changed if leaves[n] not in EMBEDDINGS + HEADS]:
            raise Mismatch(f"{some(others)} would grow with the vocabulary, which is not supported")
        if wrong := [n for n in changed if after[n][0] != rows]:
            raise Mismatch(f"{quoted(wrong[0])} would have {after[wrong[0]][0]:,} rows, {rows:,} are needed")
        if not self.ends.tied and self.ends.head_name not in targets:
            raise Mismatch(f"the checkpoint has no output head ({self.ends.head_name})")
        if not changed:
            raise Mismatch("the model's embedding does not follow vocab_size in config.json")

    # -- the weights

    def _grow(self, targets: dict[str, Target], embedding: Target, first: int, scale: tuple[float, bool]) -> None:
        P = self.prompt.P
        index, rows = self.prompt.index, _divided(P, *scale, embedding.dtype, self.prompt.name)
        targets[embedding.name] = grown(embedding, first, rows, index)
        nothing = np.zeros((shape_of(P)[0], embedding.shape[1]), "f4")
        if head := targets.get(self.ends.head_name):
            targets[head.name] = grown(head, first, rows if self.ends.tied else nothing, index)
        if bias := targets.get(self.ends.head_name.replace("weight", "bias")):
            targets[bias.name] = grown(bias, first, np.full((len(nothing), 1), NEVER, "f4"), index)

    # -- the files beside them

    def _tokenizer(
        self, found: tokens.Loaded | None, first: int, count: int, extras: list[tuple[Path, str]]
    ) -> list[tuple[Path, str]]:
        if found is None:
            warn(f"the base has no tokenizer: put the ids {first} to {first + count - 1} before every input yourself")
            return extras
        self.texts |= tokens.with_prompt(found, first, count)
        # what a slow tokenizer is made of would load without the virtual tokens
        return [(file, name) for file, name in extras if name not in tokens.FILES or name in tokens.KEPT]

    def _generation(self, config: dict[str, Any], ids: list[int], renormalize: bool) -> None:
        """generation_config.json: the new ids are never written, and beams are scored without them."""
        file = self.checkpoint.root / GENERATION
        said = read_json(file) if file.is_file() else _from_config(config)
        old = said.get("suppress_tokens") or []
        if not isinstance(old, list):
            raise Corrupt("suppress_tokens is not a list of ids", where=GENERATION)
        counted = {k: said[k] + len(ids) for k in COUNTED if isinstance(said.get(k), int) and said[k]}
        said = {**said, **counted, "suppress_tokens": [*old, *ids]}
        said |= {"renormalize_logits": True} if renormalize else {}
        self.texts[GENERATION] = (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode()


def grown(t: Target, first: int, rows: Any, index: int) -> Target:
    """A tensor with `rows` at its end, from row `first` on."""
    n = shape_of(rows)[0]
    shape = (first + n, *t.shape[1:])
    params = {"index": np.arange(n), "rows": rows}
    change = Change(
        registry.load("tuners", "tokens")(), params, 1.0, index, (first, first + n), matrix((n, *t.shape[1:]))
    )
    return replace(t, shape=shape, view=matrix(shape), changes=[*t.changes, change])


def _divided(P: Any, scale: float, cast: bool, dtype: str, name: str) -> Any:
    """The rows that an embedding with a scale turns into P, as close as its dtype comes."""
    if scale == 1:
        return P
    stored = NUMPY[dtype]
    wanted = load(P, "f4").astype(stored)
    factor = np.float64(np.asarray(scale, "f4").astype(stored)) if cast else np.float64(scale)
    rows = (wanted.astype("f8") / factor).astype("f4")
    back = (rows.astype(stored).astype("f8") * factor).astype("f4").astype(stored)
    if off := int((back != wanted).sum()):
        text = f"{name}: the model multiplies its embedding by {factor:g}, which no {dtype} row undoes exactly"
        warn(f"{text}: {off:,} of {wanted.size:,} numbers of the prompt are one rounding off")
    return rows


def _from_config(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers takes for a generation_config.json that is not there."""
    from transformers import GenerationConfig

    found = GenerationConfig.from_model_config(meta_model(config).config).to_diff_dict()
    return {k: v for k, v in found.items() if not k.startswith("_") and k != "transformers_version"}
