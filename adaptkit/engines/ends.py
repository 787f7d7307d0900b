"""The two ends of a language model: input embedding and output head. They may be one tensor, and they may grow.

An adapter that changes one of two tied ends unties them: the other end stays as it is, and config.json says so. An
adapter that changes both alike leaves them tied. Where a model cannot be untied without computing something else, the
merge is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapter import Adapter, Site
from ..errors import Mismatch, quoted
from ..store.arrays import load, shape_of
from ..store.checkpoint import warn
from ..store.entry import Entry
from ..store.names import direct, locate, prefixes
from .plan import Target

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "shared")
HEADS = ("lm_head", "embed_out")
LANGUAGE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
PLAIN_HEAD = ("ForCausalLM", "LMHeadModel")  # whose head is one Linear, the same tied or not
TOKENIZER = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "vocab.txt tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json"
).split()


class Ends:
    """The ends of one checkpoint, and what the adapters do to them."""

    def __init__(self, config: dict[str, Any], entries: dict[str, Entry], notes: dict[str, str]):
        """notes: the files' own metadata, where safetensors' save_model says which tied tensor it left out."""
        self.config, self.entries = config, _embedding_kept(entries, notes)
        self.embedding = _named(self.entries, EMBEDDINGS)
        self.head = _named(self.entries, HEADS)
        self.head_name = self.head or "lm_head.weight"
        self.tied = self._is_tied()
        self._located: dict[str, bool] = {}
        self.same: set[int] = set()  # adapters that change both tied ends alike
        self.resized: dict[str, Adapter] = {}  # by the adapter that brought the new size
        self._share()

    def _share(self) -> None:
        """Let tied ends that are one storage in a PyTorch file stay one tensor: the model ties them again."""
        kept = self.entries.get(self.embedding or "")
        for name, e in list(self.entries.items()) if self.tied and kept else []:
            alias = (e.file, e.offset, e.shape, e.packed) == (kept.file, kept.offset, kept.shape, kept.packed)
            if alias and name != self.embedding and (name == self.head or name.endswith("embed_tokens.weight")):
                del self.entries[name]
        self.head = self.head if self.head in self.entries else None

    def _is_tied(self) -> bool:
        said = [c["tie_word_embeddings"] for c in _configs(self.config) if "tie_word_embeddings" in c]
        if not self.embedding or not _is_language(self.config):
            return False
        return bool(said[0]) if said else self.head is None

    # -- before the places are looked up

    def prepared(self, adapters: Sequence[Adapter], config: dict[str, Any]) -> tuple[dict[str, Entry], dict[str, Any]]:
        """The entries and the config with the ends untied, when an adapter asks for it."""
        if not self.tied:
            return self.entries, config
        apart = [a for a in adapters if self._needs_untying(a)]
        if not apart:
            return self.entries, config
        self._refuse_if_bound(apart[0])
        source = self.entries[self.embedding]
        entries = dict(self.entries)
        entries.setdefault(self.head_name, replace(source, name=self.head_name))
        self.tied, self.same = False, set()
        warn(f"the adapter changes one of two tied ends: {self.head_name} becomes a tensor of its own")
        return entries, _untied(config)

    def _needs_untying(self, adapter: Adapter) -> bool:
        # rows trained for the embedding alone are meant for both ends of a tied model; those of the head are its own
        tokens = self._change(adapter, self.is_end, tokens=True) is not None
        embedding, head = (self._change(adapter, end, tokens) for end in (self.is_embedding, self.is_end))
        if embedding is None and head is None:
            return False
        if embedding is not None and head is not None and _alike(embedding, head):
            self.same.add(id(adapter))
            return False
        return True

    def _change(self, adapter: Adapter, is_mine: Callable[[str], bool], tokens: bool) -> Any:
        """What an adapter does to one end: a site or a tensor. tokens: whether rows of tokens count."""
        for path, site in adapter.sites.items():
            if path and (tokens or site.tuner.name != "tokens") and is_mine(f"{path}.weight"):
                return site
        return next((value for name, value in adapter.whole.items() if is_mine(name)), None)

    def _refuse_if_bound(self, adapter: Adapter) -> None:
        kind = quoted(self.config.get("model_type"))
        plain = any(str(a).endswith(PLAIN_HEAD) for a in self.config.get("architectures") or ("ForCausalLM",))
        if self.config.get("is_encoder_decoder") or not plain:
            raise Mismatch(
                f"changes one of two tied ends, and a {kind} model computes something else when they are untied",
                where=Path(adapter.meta.get("path", "adapter")).name,
                hint="serve it as an adapter, or train it without the embedding and the head",
            )

    def is_embedding(self, name: str) -> bool:
        """Whether a parameter is the input embedding, also under the name that the model has for it."""
        if self.embedding is None or name.removesuffix(".weight").rpartition(".")[2] not in EMBEDDINGS:
            return False
        if found := direct(name, self.entries, prefixes(self.entries)):
            return found == self.embedding
        if name not in self._located:
            site = name.removesuffix(".weight")
            shapes = {n: e.shape for n, e in self.entries.items()}
            edges = locate(self.config, shapes, [site], optional=[site]).get(site, [])
            self._located[name] = any(e.disk == self.embedding for e in edges)
        return self._located[name]

    def is_end(self, name: str) -> bool:
        """Whether a parameter is the output head."""
        return name.endswith(".weight") and name.removesuffix(".weight").rpartition(".")[2] in HEADS

    # -- while the plan is made

    def sites(self, adapter: Adapter) -> dict[str, Site]:
        """An adapter's sites: without the head's when both tied ends change alike, since they are one tensor."""
        sites = dict(adapter.sites)
        if self.tied and self.head is None:
            return {p: s for p, s in sites.items() if not self.is_end(f"{p}.weight")}
        if self.tied and self.head is not None:
            tokens = [s for p, s in sites.items() if s.tuner.name == "tokens" and self.is_embedding(f"{p}.weight")]
            sites |= {self.head.removesuffix(".weight"): s for s in tokens}
        return sites

    def drops(self, disk: str, adapter: Adapter) -> bool:
        """Whether a tensor is the second copy of a tied one."""
        return self.tied and self.head is None and self.is_end(disk) and id(adapter) in self.same

    def may_resize(self, disk: str, old: tuple[int, ...], new: tuple[int, ...], adapter: Adapter) -> bool:
        """Whether a tensor may change its number of rows: an end, or a head that modules_to_save names."""
        if old[1:] != new[1:]:
            return False
        end = disk in (self.embedding, self.head_name) or disk == self.head_name.replace("weight", "bias")
        path = disk.rpartition(".")[0]
        saved = adapter.about.get("modules_to_save") or ()
        if end or any(path == s or path.endswith(f".{s}") for s in saved if s in LABELS):
            self.resized[disk] = adapter
            return True
        return False

    # -- when the plan is made

    def grown(self, targets: dict[str, Target], config: dict[str, Any], adapters: Sequence[Adapter]) -> dict[str, Any]:
        """The config with the vocabulary or the labels that the new shapes say. Raises Mismatch when the ends differ."""
        if not config:
            return config
        config = self._said_untied(targets, _labels(targets, config, adapters))
        if not self.resized.keys() & {self.embedding, self.head_name}:
            return config
        ends = {n: targets[n].shape[0] for n in (self.embedding, self.head_name) if n in targets}
        if len(set(ends.values())) > 1:
            sizes = " and ".join(f"{n} has {rows}" for n, rows in ends.items())
            raise Mismatch(f"the vocabulary would have two sizes: {sizes} rows", hint="save both ends with the adapter")
        return with_vocabulary(config, next(iter(ends.values())))

    def _said_untied(self, targets: dict[str, Target], config: dict[str, Any]) -> dict[str, Any]:
        """The config, saying that the ends differ when they do: left out, some families take them for tied."""
        ends = [targets.get(n or "") for n in (self.embedding, self.head)]
        said = any("tie_word_embeddings" in c for c in _configs(config))
        changed = [t is not None and bool(t.changes or t.replaced) for t in ends]
        if self.tied or said or None in ends or not any(changed) or not _is_language(config):
            return config
        return {**config, "tie_word_embeddings": False}

    def tokenizer(self, extras: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
        """The files beside the weights; the adapter's tokenizer when its vocabulary is the new one."""
        grown = [self.resized[end] for end in (self.embedding, self.head_name) if end in self.resized]
        if not grown:
            return extras
        folder = Path(grown[0].meta.get("path", "."))
        mine = {n: folder / n for n in TOKENIZER if (folder / n).is_file()}
        if not mine:
            warn(f"the vocabulary grew, but {folder.name} holds no tokenizer; the base's is kept")
            return extras
        kept = [(file, name) for file, name in extras if name not in TOKENIZER]
        return kept + [(file, name) for name, file in sorted(mine.items())]


LABELS = ("classifier", "score", "qa_outputs", "out_proj", "classification_head")


def _embedding_kept(entries: dict[str, Entry], notes: dict[str, str]) -> dict[str, Entry]:
    """The entries, with the embedding in the place of a head that was kept instead of it.

    Of two tied tensors save_model keeps the first by name, "lm_head.weight", and notes the other. transformers keeps the
    embedding, and everything here counts on that.
    """
    for name, kept in notes.items():
        if name.endswith(tuple(f"{e}.weight" for e in EMBEDDINGS)) and kept in entries and name not in entries:
            return {(name if n == kept else n): (replace(e, name=name) if n == kept else e) for n, e in entries.items()}
    return dict(entries)


def _labels(targets: dict[str, Target], config: dict[str, Any], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """config.json with as many labels as a replaced classification head has rows."""
    kinds = {a.about.get("task_type") for a in adapters}
    heads = [
        t
        for n, t in targets.items()
        if t.replaced and n.rpartition(".")[0].rpartition(".")[2] in ("classifier", "score", "out_proj")
    ]
    if not kinds & {"SEQ_CLS", "TOKEN_CLS"} or not heads or len(heads[-1].shape) != 2:
        return config
    n = heads[-1].shape[0]
    told = len(config.get("id2label") or {}) or config.get("num_labels") or 2
    if told == n:
        return config
    names = {str(i): f"LABEL_{i}" for i in range(n)}
    return {**config, "id2label": names, "label2id": {v: int(k) for k, v in names.items()}}


def with_vocabulary(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """config.json with a vocabulary of so many rows."""
    text = config.get("text_config")
    if isinstance(text, dict) and "vocab_size" in text:
        return {**config, "text_config": {**text, "vocab_size": rows}}
    return {**config, "vocab_size": rows}


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    config = {**config, "tie_word_embeddings": False}
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        config["text_config"] = {**text, "tie_word_embeddings": False}
    return config


def _configs(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [config, *(c for k in ("text_config", "llm_config") if isinstance(c := config.get(k), dict))]


def _is_language(config: dict[str, Any]) -> bool:
    kinds = config.get("architectures") or []
    return any(str(k).endswith(LANGUAGE) for k in kinds) if kinds else "vocab_size" in config


def _named(entries: dict[str, Entry], leaves: tuple[str, ...]) -> str | None:
    names = {
        n.removesuffix(".weight").rpartition(".")[2]: n for n in entries if n.endswith(".weight") and n.count(".") < 5
    }
    return next((names[leaf] for leaf in leaves if leaf in names), None)


def _alike(a: Any, b: Any) -> bool:
    """Whether two changes of one matrix are the same, though one may be written as its transpose."""
    if not isinstance(a, Site) or not isinstance(b, Site):
        same = not isinstance(a, Site) and not isinstance(b, Site) and shape_of(a) == shape_of(b)
        return same and bool((load(a) == load(b)).all())
    mine = {k: load(v, "f4") for k, v in a.params.items()}
    other = {k: load(v, "f4") for k, v in b.params.items()}
    if set(mine) == set(other) == {"index", "rows"}:
        return all(mine[k].shape == other[k].shape and (mine[k] == other[k]).all() for k in mine)
    if set(mine) != {"A", "B"} or set(other) != {"A", "B"} or a.tuner.scale != b.tuner.scale:
        return False
    pairs = [(mine["A"], other["A"]), (mine["B"], other["B"])]
    turned = [(mine["A"], other["B"].T), (mine["B"], other["A"].T)]
    return any(all(x.shape == y.shape and (x == y).all() for x, y in p) for p in (pairs, turned))
