"""extract: the LoRA that makes a base model into its fine-tuned one.  W' - W ~ B A, site by site."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import registry
from ..adapter import Adapter, Site
from ..algebra.randomised import Thin, holding, truncated
from ..engines.device import checked
from ..engines.difference import difference, same
from ..engines.ends import TOKENIZER
from ..engines.local import single_threaded_blas
from ..engines.pairs import Pair, Pairs, paired
from ..errors import Corrupt, Mismatch, Usage, quoted, some
from ..select import Select, parse_layers
from ..store import destination
from ..store.arrays import WORDS
from ..store.checkpoint import Checkpoint, stamps, unchanged, warn
from ..store.hub import called, origin
from ..store.hub.ghost import glance
from ..tuners.experts import LAYOUT
from . import stacks
from .inputs import dtype_of, model_of, workers_of
from .merge import check_pickles, unhurried
from .receipt import about
from .recipe import how_thin
from .targets import rule_of

Progress = Callable[[int, int], None]
SITES = ("lora", "experts")  # how a tensor is held when it becomes a site


@dataclass
class Extraction:
    """One site. rank: kept.   error: |D - B A| / |D|.   energy: the share of D's squared singular values that is kept.

    norm: |D|, Frobenius.   excess: how far above the smallest error of that rank it may be, estimated.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    error: float
    energy: float
    norm: float
    excess: float


@dataclass
class Extracted:
    """What an extraction did.

    sites: of the LoRA.    whole: tensors that are saved as they are.    unchanged: how many tensors are alike.
    left: tensors that changed and are not in the adapter.    error: over all sites, |D - B A| / |D|.
    """

    output: Path
    sites: list[Extraction]
    whole: list[str]
    unchanged: int
    left: list[str]
    error: float
    bytes: int
    seconds: float


def extract(
    finetuned: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    target_modules: str | Collection[str] | None = None,
    layers: str | Collection[int] | None = None,
    partial: bool = False,
    dtype: str = "float32",
    device: str = "auto",
    workers: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Extracted:
    """Extract a LoRA from a fine-tuned model and its base, on files.

    finetuned, base: model folders or weight files.     output: a folder in PEFT's format, that appears when it is complete.
    rank: of every site.    energy: or, for each site, the smallest rank that keeps this share of the squared singular
    values, at most max_rank.    target_modules, layers: only these modules become LoRA sites.
    partial: leave out what changed and cannot be held, or was not selected; otherwise that is refused.
    dtype: of the factors. Tensors that are no matrices of a layer are saved whole, as the fine-tuned model has them.
    workers: threads, each with one matrix in float32 at a time.    progress: called with (bytes, of bytes).

    Raises Usage, Corrupt, Mismatch or System, before a byte is written.
    """
    start = time.monotonic()
    asked = _Asked(rank, energy, max_rank, seed, checked(device))
    work = _Work.planned(finetuned, base, output, target_modules, layers, overwrite, progress)
    word = WORDS[dtype_of(dtype) or "float32"]
    workers = workers_of(workers)
    for checkpoint in (work.finetuned, work.base):
        check_pickles(checkpoint)
    found = _gathered(work, _run(work, asked, workers, partial, progress or (lambda done, total: None)))
    unchanged(work.stamps)
    adapter = _adapter(work, found)
    made = {"verb": "extract", "rank": rank, "energy": energy, "max_rank": max_rank, "seed": seed, "partial": partial}
    registry.load("formats", "peft")().write(
        adapter, Path(output), dtype=word, overwrite=overwrite, inputs=work.inputs, beside=_tokenizer(work, found),
        said={**about(made, work.base.path, [work.finetuned.path]), "adapters": [], "finetuned": called(work.finetuned.path)},
    )  # fmt: skip
    return _said(Path(output), found, time.monotonic() - start)


@dataclass(frozen=True)
class _Asked:
    """How much of each difference is kept."""

    rank: int | None
    energy: float | None
    most: int | None
    seed: int
    device: Any

    def __post_init__(self) -> None:
        how_thin(self.rank, self.energy, self.most)
        if self.seed < 0:
            raise Usage(f"{self.seed} is negative", where="--seed")

    def thin(self, D: np.ndarray, name: str) -> Thin:
        """D ~ L R. The random start depends on the name, so that neither order nor threads matter."""
        seed, given = [self.seed, zlib.crc32(name.encode())], D
        if self.device is not None:
            import torch

            given = torch.from_numpy(D).to(self.device)
        if self.energy is not None:
            found = holding(given, self.energy, seed, most=self.most)
        else:
            found = truncated(given, self.rank, seed)
        if self.device is not None:
            found.L, found.R = found.L.cpu().numpy(), found.R.cpu().numpy()
        return found


@dataclass
class _Work:
    """The two models, and which of their modules may become sites."""

    finetuned: Checkpoint
    base: Checkpoint
    pairs: Pairs
    chosen: set[str]
    selects: bool
    stamps: dict

    @classmethod
    def planned(
        cls, finetuned: Any, base: Any, output: Any, modules: Any, layers: Any, overwrite: bool, progress: Any = None
    ) -> _Work:
        with unhurried():
            new, old = model_of(finetuned, progress), model_of(base, progress)
            destination.checked(Path(output), [new.path, old.path], overwrite)
            pairs = paired(new, old)
            able = [p.module for p in pairs.found if p.how in SITES]
            selects = modules is not None or layers is not None
            chosen = set(_select(modules, layers)(able)) if selects else set(able)
        return cls(new, old, pairs, chosen, selects, stamps([*new.files, *old.files]))

    @property
    def inputs(self) -> list[Path]:
        return [self.finetuned.path, self.base.path]

    def holds(self, pair: Pair) -> bool:
        """Whether the adapter holds a tensor if it changed."""
        return pair.how == "whole" or (pair.how in SITES and pair.module in self.chosen)


def _select(modules: str | Collection[str] | None, layers: str | Collection[int] | None) -> Select:
    chosen = rule_of(modules) if modules is not None else ".*"
    by_pattern = isinstance(chosen, str)
    numbers = parse_layers(layers) if isinstance(layers, str) else layers
    return Select(pattern=chosen if by_pattern else None, names=None if by_pattern else chosen, layers=numbers)


def _refuse_left(left: Collection[Pair], partial: bool) -> None:
    if not left:
        return
    why = next(iter(left)).why or "it was not selected"
    what = f"{len(left)} changed tensors would not be in the adapter: {some([p.name for p in left])} ({why})"
    if not partial:
        raise Mismatch(what, hint="select more, or use --partial to leave them out")
    warn(f"{what}; the base with the adapter is not the fine-tuned model")


# the work


@dataclass
class _Result:
    pair: Pair
    changed: bool
    thin: Thin | None = None


def _run(work: _Work, asked: _Asked, workers: int, partial: bool, progress: Progress) -> list[_Result]:
    """What no adapter would hold is looked at first, so that a refusal does not come after hours."""
    total, done, results = sum(p.nbytes for p in work.pairs.found), 0, []
    with single_threaded_blas(), ThreadPoolExecutor(workers) as pool:
        try:
            for held in (False, True):
                pairs = [p for p in work.pairs.found if work.holds(p) == held]
                jobs = [pool.submit(_one, p, p.module in work.chosen, asked) for p in pairs]
                for job, pair in zip(jobs, pairs, strict=True):
                    results.append(job.result())
                    done += pair.nbytes
                    progress(done, total)
                _refuse_left([r.pair for r in results if r.changed and not held], partial)
        finally:
            pool.shutdown(cancel_futures=True)
    return results


def _one(pair: Pair, chosen: bool, asked: _Asked) -> _Result:
    if pair.base is None:
        return _Result(pair, True)
    if pair.how not in SITES or not chosen:
        return _Result(pair, not same(pair.finetuned, pair.base))
    try:
        thin = stacks.thin(pair, asked.thin) if pair.how == "experts" else _matrix(pair, asked)
        return _Result(pair, thin is not None, thin)
    except ValueError as e:
        raise Corrupt(f"{quoted(pair.name)} {e} in one of the models", hint="train it again") from None


def _matrix(pair: Pair, asked: _Asked) -> Thin | None:
    D = difference(pair.finetuned, pair.base)
    return None if D is None else asked.thin(D, pair.name)


@dataclass
class _Found:
    """What changed, by how it is held."""

    thin: list[_Result] = field(default_factory=list)
    whole: list[Pair] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    unchanged: int = 0
    bias: str = "none"


def _gathered(work: _Work, results: list[_Result]) -> _Found:
    found = _Found()
    for r in results:
        if not r.changed:
            found.unchanged += 1
        elif r.thin is not None:
            found.thin.append(r)
        elif r.pair.how == "whole":
            found.whole.append(r.pair)
        else:
            found.left.append(r.pair.name)
    _complete(work, found)
    if not found.thin and not found.whole and not found.left:
        raise Mismatch("the two models are the same: there is nothing to extract")
    return found


def _complete(work: _Work, found: _Found) -> None:
    """A module is saved whole or not at all; a bias alone, or of an adapted module, is what the setting `bias` is for."""
    adapted = {r.pair.module for r in found.thin}
    loose = [p for p in found.whole if _is_bias(p)]
    modules = {p.module for p in found.whole if not _is_bias(p)}
    if any(p.module not in modules for p in loose):
        found.bias = "lora_only" if all(p.module in adapted | modules for p in loose) else "all"
    have = {p.name for p in found.whole}
    more = [p for p in work.pairs.found if p.module in modules and p.name not in have and p.how == "whole"]
    found.whole += more
    found.unchanged -= len(more)


def _is_bias(pair: Pair) -> bool:
    return pair.name.endswith(".bias")


# the adapter


def _adapter(work: _Work, found: _Found) -> Adapter:
    adapter = Adapter({r.pair.module: _site(r) for r in found.thin}, {p.name: p.finetuned for p in found.whole})
    _tied(work, adapter)
    _for_peft(work, adapter)
    adapter.about = {"bias": found.bias, "task_type": _task(work.base.config), "peft_version": LAYOUT}
    ref = origin(work.base.path)
    if ref and not ref.sub:
        adapter.about["revision"] = ref.revision
    adapter.meta = {"base": called(work.base.path) if ref else work.base.path.resolve().name}
    return adapter


def _site(result: _Result) -> Site:
    thin, shape = result.thin, result.pair.base.shape
    if result.pair.how == "experts":
        return stacks.site(thin, result.pair.turned)
    L, R, r = thin.L, thin.R, thin.rank
    A, B = (L.T, R.T) if result.pair.turned else (R, L)
    if len(shape) > 2:
        A, B = R.reshape(r, *shape[1:]), L.reshape(shape[0], r, *[1] * (len(shape) - 2))
    tuner = registry.load("tuners", "lora")(r=r, alpha=float(r), transposed=result.pair.turned)
    return Site(tuner, {"A": np.ascontiguousarray(A, "f4"), "B": np.ascontiguousarray(B, "f4")})


def _tied(work: _Work, adapter: Adapter) -> None:
    """Ends that are one tensor in both models stay one: the adapter names both, alike."""
    ends = work.pairs.ends
    mine = next((n for n in adapter.whole if ends.embedding and ends.is_embedding(n)), None)
    if mine and work.pairs.tied and ends.tied:
        adapter.whole.setdefault(ends.head_name, adapter.whole[mine])


def _for_peft(work: _Work, adapter: Adapter) -> None:
    """Warn of what `adaptkit merge` takes and PEFT does not."""
    if not adapter.sites:
        warn("no matrix of a layer changed: PEFT itself refuses an adapter without sites, adaptkit merge takes it")
    shared = [n for n in adapter.whole if n.rpartition(".")[0].rpartition(".")[2] == "shared"]
    if shared and work.base.config.get("is_encoder_decoder"):
        warn(
            f"{shared[0]} is one tensor under several names, of which PEFT replaces only this; adaptkit merge replaces all"
        )


def _task(config: dict[str, Any]) -> str | None:
    kind = str((config.get("architectures") or [""])[0])
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if kind.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder") else None


def _tokenizer(work: _Work, found: _Found) -> list[tuple[Path, str]]:
    """The fine-tuned model's tokenizer, where the vocabulary grew."""
    if not any(p.base and p.base.shape != p.finetuned.shape for p in found.whole) or work.finetuned.path.is_file():
        return []
    return [(work.finetuned.root / n, n) for n in TOKENIZER if (work.finetuned.root / n).is_file()]


def _said(output: Path, found: _Found, seconds: float) -> Extracted:
    sites = [
        Extraction(r.pair.module, r.pair.finetuned.shape, r.thin.rank, _share(r.thin.error, r.thin.norm), r.thin.energy,
                   r.thin.norm, r.thin.excess) for r in found.thin
    ]  # fmt: skip
    error = math.hypot(*(r.thin.error for r in found.thin))
    norm = math.hypot(*(r.thin.norm for r in found.thin))
    written = sum(f.stat().st_size for f in output.iterdir())
    whole = [p.name for p in found.whole]
    return Extracted(output, sites, whole, found.unchanged, found.left, _share(error, norm), written, seconds)


def _share(part: float, of: float) -> float:
    return part / of if of else 0.0


# without doing it


def _matrices(pair: Pair) -> list[tuple[int, int]]:
    """The shapes of what is decomposed for one site."""
    first, *rest = pair.base.shape
    return [tuple(rest)] * first if pair.how == "experts" else [(first, math.prod(rest))]


@dataclass
class Rehearsed:
    """What an extraction would look at. lora, whole, unable: names of modules and tensors; what changed is not known yet.

    bytes: of the factors at most.    memory: of matrices held at once.
    """

    lora: list[str]
    whole: list[str]
    unable: list[str]
    bytes: int
    memory: int


def rehearsed(finetuned: str | Path, base: str | Path, output: str | Path, **options: Any) -> Rehearsed:
    """What `extract` would do, from headers alone. Takes the options of `extract`."""
    asked = _Asked(options["rank"], options["energy"], options["max_rank"], options["seed"], checked(options["device"]))
    places = (options["target_modules"], options["layers"], options["overwrite"])
    with glance(finetuned, "model") as new, glance(base, "model") as old:
        work = _Work.planned(new, old, output, *places)
    sites = [p for p in work.pairs.found if p.how in SITES and p.module in work.chosen]
    shapes = [s for p in sites for s in _matrices(p)]
    most = min(asked.rank or 1 << 30, asked.most or 1 << 30)
    size = {"float32": 4, "keep": 4}.get(options["dtype"], 2)
    # D once, and once more while its residual is made out
    memory = 8 * max((m * n for m, n in shapes), default=0) * workers_of(options["workers"])
    rest = [p for p in work.pairs.found if p not in sites]
    return Rehearsed(
        lora=[p.module for p in sites],
        whole=[p.name for p in rest if p.how == "whole"],
        unable=[f"{quoted(p.name)}: {p.why or 'not selected'}" for p in rest if p.how != "whole"],
        bytes=size * sum(min(most, m, n) * (m + n) for m, n in shapes),
        memory=memory,
    )
