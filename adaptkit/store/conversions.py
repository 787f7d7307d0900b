"""Which tensors on disk hold a parameter when transformers renames, fuses, splits or transposes while it loads.

    disk[disk_expert][disk_rows]  =  parameter[expert][rows][permutation]        (then transposed, if it says so)

transformers' own tables and operations are run, but on tensors that have no numbers and remember where each of their
parts came from (`Traced`). So nothing is said twice here, and an operation that cannot be followed is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from ..errors import AdaptKitError, Mismatch, quoted
from .metamodel import meta_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightRenaming

LONGEST_NAME = 400  # transformers' patterns are searched in every name


@dataclass(frozen=True, slots=True)
class Edge:
    """One tensor on disk that holds a parameter, or a part of it. None means: all of it.

    expert, disk_expert: index into the first dimension.     rows, disk_rows: of the first dimension that remains.
    With D = disk[disk_expert][disk_rows] and P = parameter[expert][rows]:
    D is P; or P.T when `transposed`; or P[permutation], that is, row i of D is row permutation[i] of P.
    """

    parameter: str
    disk: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    disk_expert: int | None = None
    disk_rows: tuple[int, int] | None = None
    transposed: bool = False
    permutation: tuple[int, ...] | None = None


def edges(
    config: Mapping[str, Any], disk: Mapping[str, tuple[int, ...]], wanted: Collection[str]
) -> dict[str, list[Edge]]:
    """For every wanted name, in the model's layout or the file's or an older one, the disk tensors that hold it.

    config: the parsed config.json (not trusted).    disk: names and shapes of the checkpoint.
    A name that cannot be found is left out. An operation that cannot be followed raises Mismatch.
    """
    if any(len(name) > LONGEST_NAME for name in (*disk, *wanted)):
        raise Mismatch(f"has a tensor name of more than {LONGEST_NAME} characters", where="checkpoint or adapter")
    try:
        loading = _Loading(meta_model(config, parts=16 * len(disk) + 4096), disk)
        found = {name: loading.find(name) for name in sorted(wanted, key=loading.order)}
        return {name: list(_edges(name, traced, loading.disk)) for name, traced in found.items() if traced is not None}
    except Untraceable as error:
        kind = quoted(config.get("model_type"))
        hint = "save the base with the names that the model uses (save_original_format=False)"
        what = f"the way transformers loads {kind} cannot be followed: {error}"
        raise Mismatch(what, where="checkpoint", hint=hint) from None


class Untraceable(ValueError):
    """Something was done to a traced tensor that cannot be told as slices of tensors on disk."""


# ---- tensors that remember where they came from -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a traced tensor, and the elements of one disk tensor that fill it.

    box: for each dimension of the traced tensor, where the box lies.
    axes: for each dimension of the disk tensor, the traced dimension that runs along it; None where it stands still.
    index: for each dimension of the disk tensor, the positions taken.
    """

    disk: str
    box: tuple[range, ...]
    axes: tuple[int | None, ...]
    index: tuple[Sequence[int], ...]

    def along(self, dim: int, where: range, taken: Callable[[Sequence[int]], Sequence[int]] = lambda i: i) -> Piece:
        """The piece with another range along `dim`, filled by what is `taken` of the positions that filled it."""
        index = tuple(taken(i) if axis == dim else i for axis, i in zip(self.axes, self.index, strict=True))
        return Piece(self.disk, _set(self.box, dim, where), self.axes, index)

    def moved(self, box: tuple[range, ...], new: Mapping[int | None, int | None]) -> Piece:
        """The piece in another box, every traced dimension under its new number."""
        return Piece(self.disk, box, tuple(new[axis] for axis in self.axes), self.index)


class Traced:
    """A tensor without numbers, made of pieces of tensors on disk; torch's functions on it move the pieces."""

    def __init__(self, shape: Sequence[int], pieces: Sequence[Piece]):
        self.shape, self.pieces = tuple(shape), tuple(pieces)

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> Traced:
        """A tensor as it lies on disk."""
        box = tuple(range(n) for n in shape)
        return cls(shape, [Piece(name, box, tuple(range(len(box))), box)])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in FOLLOWED:
            raise Untraceable(f"torch.{name} is not one of {', '.join(FOLLOWED)}")
        return FOLLOWED[name](*args, **(kwargs or {}))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def contiguous(self) -> Traced:
        return self

    def chunk(self, chunks: int, dim: int = 0) -> list[Traced]:
        size = -(-self.shape[dim] // chunks) or 1
        starts = range(0, self.shape[dim], size)
        return [self.part(dim, at, min(at + size, self.shape[dim])) for at in starts]

    def split(self, sizes: Sequence[int], dim: int = 0) -> list[Traced]:
        if sum(sizes) != self.shape[dim]:
            raise Untraceable(f"{self.shape[dim]} rows do not split into {list(sizes)}")
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [self.part(dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def unbind(self, dim: int = 0) -> list[Traced]:
        return [self.part(dim, i, i + 1).squeeze(dim) for i in range(self.shape[dim])]

    def part(self, dim: int, start: int, stop: int) -> Traced:
        """Positions start to stop along `dim`."""
        dim %= self.ndim
        pieces = []
        for piece in self.pieces:
            at = piece.box[dim]
            low, high = max(at.start, start), min(at.stop, stop)
            if low < high:
                taken = itemgetter(slice(low - at.start, high - at.start))
                pieces.append(piece.along(dim, range(low - start, high - start), taken))
        return Traced(_set(self.shape, dim, stop - start), pieces)

    def squeeze(self, dim: int) -> Traced:
        dim %= self.ndim
        if self.shape[dim] != 1:
            return self
        new = {None: None, dim: None} | {a: a - (a > dim) for a in range(self.ndim) if a != dim}
        return Traced(_drop(self.shape, dim), [p.moved(_drop(p.box, dim), new) for p in self.pieces])

    def transpose(self, dim0: int, dim1: int) -> Traced:
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        new = {None: None} | {axis: at for at, axis in enumerate(order)}
        pieces = [p.moved(tuple(p.box[d] for d in order), new) for p in self.pieces]
        return Traced([self.shape[d] for d in order], pieces)

    def reordered(self, dim: int, order: Sequence[int]) -> Traced:
        """Row i is what row order[i] was."""
        dim %= self.ndim
        if sorted(order) != list(range(self.shape[dim])):
            raise Untraceable("rows are repeated or left out")
        if any(p.box[dim] != range(self.shape[dim]) for p in self.pieces):
            raise Untraceable("rows of several tensors are mixed")
        pieces = [p.along(dim, p.box[dim], lambda index: _run([index[o] for o in order])) for p in self.pieces]
        return Traced(self.shape, pieces)


def _set(values: tuple, at: int, value: Any) -> tuple:
    return (*values[:at], value, *values[at + 1 :])


def _drop(values: tuple, at: int) -> tuple:
    return (*values[:at], *values[at + 1 :])


def _stack(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    first = tensors[0].shape
    if any(t.shape != first for t in tensors):
        raise Untraceable(f"{len(tensors)} tensors to be stacked have different shapes, {first} is the first")
    dim %= len(first) + 1
    new = {None: None} | {axis: axis + (axis >= dim) for axis in range(len(first))}
    pieces = [
        p.moved((*p.box[:dim], range(i, i + 1), *p.box[dim:]), new) for i, t in enumerate(tensors) for p in t.pieces
    ]
    return Traced((*first[:dim], len(tensors), *first[dim:]), pieces)


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    dim %= tensors[0].ndim
    if len({_drop(t.shape, dim) for t in tensors}) != 1:
        raise Untraceable(f"tensors to be joined do not fit: {', '.join(str(t.shape) for t in tensors[:4])}")
    pieces, at = [], 0
    for tensor in tensors:
        pieces += [p.along(dim, range(p.box[dim].start + at, p.box[dim].stop + at)) for p in tensor.pieces]
        at += tensor.shape[dim]
    return Traced(_set(tensors[0].shape, dim, at), pieces)


FOLLOWED: dict[str, Callable[..., Any]] = {
    "stack": _stack,
    "cat": _cat,
    "chunk": Traced.chunk,
    "split": Traced.split,
    "unbind": Traced.unbind,
    "transpose": Traced.transpose,
}


def _run(positions: Sequence[int]) -> Sequence[int]:
    """A range when the positions follow each other, else a tuple."""
    run = range(positions[0], positions[0] + len(positions)) if positions else range(0)
    return run if all(a == b for a, b in zip(positions, run, strict=True)) else tuple(positions)


# ---- from pieces to edges -----------------------------------------------------------------------------------------


def _edges(name: str, traced: Traced, disk: Mapping[str, tuple[int, ...]]) -> Iterator[Edge]:
    for piece in traced.pieces:
        yield from _piece_edges(name, traced.shape, piece, disk[piece.disk])


def _piece_edges(name: str, shape: tuple[int, ...], piece: Piece, on_disk: tuple[int, ...]) -> Iterator[Edge]:
    stacked = len(shape) > 0 and 0 not in piece.axes  # the first dimension counts tensors, or slices of one
    sliced = None in piece.axes[:1]
    if stacked or sliced:
        expert = piece.box[0].start if stacked else None
        disk_expert = piece.index[0][0] if sliced else None
        yield _matrix(Edge(name, piece.disk, expert, disk_expert=disk_expert), shape, piece, on_disk)
    elif len(shape) == 3 and piece.axes[0] == 0 and not _plain(shape, piece, on_disk):
        for expert, disk_expert in zip(piece.box[0], piece.index[0], strict=True):
            yield _matrix(Edge(name, piece.disk, expert, disk_expert=disk_expert), shape, piece, on_disk)
    else:
        yield _matrix(Edge(name, piece.disk), shape, piece, on_disk)


def _plain(shape: tuple[int, ...], piece: Piece, on_disk: tuple[int, ...]) -> bool:
    """True when only the first dimension may differ between the two."""
    inner = range(1, len(shape))
    if piece.axes[1:] != tuple(inner):
        return False
    return all(piece.box[d] == range(shape[d]) and piece.index[d] == range(on_disk[d]) for d in inner)


def _matrix(edge: Edge, shape: tuple[int, ...], piece: Piece, on_disk: tuple[int, ...]) -> Edge:
    """Fill in rows, disk_rows, transposed and permutation of what is left below the expert."""
    dims = list(range(edge.expert is not None, len(shape)))
    along = list(range(edge.disk_expert is not None, len(on_disk)))
    axes = [piece.axes[d] for d in along]
    transposed = len(dims) == 2 and axes == dims[::-1]
    whole = all(piece.box[d] == range(shape[d]) for d in dims[1:])
    if (axes != dims and not transposed) or not whole:
        raise Untraceable(f"{quoted(edge.parameter)} is spread over {quoted(edge.disk)} in more than rows")
    if any(piece.index[d] != range(on_disk[d]) for d in along[1:]):
        raise Untraceable(f"{quoted(edge.parameter)} is in only some columns of {quoted(edge.disk)}")
    if not dims:
        return edge
    rows = _span(piece.box[dims[0]], shape[dims[0]])
    disk_rows, permutation = _rows(piece.index[along[0]], on_disk[along[0]], edge)
    if permutation and transposed:
        raise Untraceable(f"{quoted(edge.disk)} holds {quoted(edge.parameter)} both transposed and permuted")
    return replace(edge, rows=rows, disk_rows=disk_rows, transposed=transposed, permutation=permutation)


def _span(span: range, size: int) -> tuple[int, int] | None:
    return None if span == range(size) else (span.start, span.stop)


def _rows(index: Sequence[int], size: int, edge: Edge) -> tuple[tuple[int, int] | None, tuple[int, ...] | None]:
    """The disk rows, and for each the parameter row it is, when they are not in the same order."""
    if isinstance(index, range) and index.step == 1:
        return _span(index, size), None
    low = min(index)
    span = range(low, low + len(index))
    if sorted(index) != list(span):
        raise Untraceable(f"rows of {quoted(edge.parameter)} alternate with others in {quoted(edge.disk)}")
    at = {row: i for i, row in enumerate(index)}
    return _span(span, size), tuple(at[row] for row in span)


# ---- transformers' loading, followed ------------------------------------------------------------------------------


@dataclass
class _Group:
    """Tensors that one conversion turns into one or several parameters."""

    first: str
    converter: WeightConverter | None
    sources: dict[str, list[str]]

    def targets(self) -> list[str]:
        if self.converter is None:
            return [self.first]
        patterns = self.converter.target_patterns
        return [self.first.replace(patterns[0], pattern, 1) for pattern in patterns]


class _Loading:
    """What transformers would do with the checkpoint: for each parameter, the group of disk tensors it is made of."""

    def __init__(self, model: PreTrainedModel, disk: Mapping[str, tuple[int, ...]]):
        from transformers.core_model_loading import dot_natural_key

        self.model, self.order = model, dot_natural_key
        self.disk = {name: tuple(shape) for name, shape in disk.items()}
        self.parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.made: dict[int, dict[str, Traced]] = {}
        self.undone: dict[tuple[int, str], dict[str, Traced]] = {}
        self.names = _Names(model, self.parameters)

    def find(self, name: str) -> Traced | None:
        """The tensor of that name, in pieces of the disk's; None when it is nowhere."""
        if name in self.parameters:
            return self.parameter(name)
        if name in self.disk:
            return Traced.whole(name, self.disk[name])
        renamed, converter = self.names.parameter(name)
        if converter is None:
            return self.parameter(renamed) if renamed in self.parameters else None
        return self.older(name, renamed, converter)

    @cached_property
    def groups(self) -> dict[str, _Group]:
        """Parameter name -> the group that makes it."""
        groups: dict[str, _Group] = {}
        names = _Names(self.model, self.parameters)
        for name in sorted(self.disk, key=self.order):
            renamed, converter, pattern = names.parameter_and_pattern(name)
            if renamed in self.parameters:
                group = groups.setdefault(renamed, _Group(renamed, converter, {}))
                group.sources.setdefault(pattern or "", []).append(name)
        return {target: group for group in groups.values() for target in group.targets()}

    def parameter(self, name: str) -> Traced | None:
        group = self.groups.get(name)
        if group is None:
            return None
        if id(group) not in self.made:
            self.made[id(group)] = self._make(group)
        traced = self.made[id(group)].get(name)
        if traced is not None and traced.shape != self.parameters[name]:
            raise Mismatch(
                f"{quoted(name)} is {self.parameters[name]} by config.json and {traced.shape} on disk",
                hint="use the config.json that belongs to these weights",
            )
        return traced

    def _make(self, group: _Group) -> dict[str, Traced]:
        leaves = {p: [Traced.whole(n, self.disk[n]) for n in names] for p, names in group.sources.items()}
        if group.converter is not None:
            return self._convert(group.converter, group.first, leaves)
        (tensors,) = leaves.values()
        if len(tensors) > 1:
            claims = " and ".join(quoted(t.pieces[0].disk) for t in tensors[:2])
            raise Mismatch(f"{claims} both claim to be {quoted(group.first)}", hint="remove one from the checkpoint")
        return {group.first: tensors[0]}

    def older(self, name: str, first: str, converter: WeightConverter) -> Traced | None:
        """A tensor of an older layout, cut out of the parameters that a conversion would have made of it."""
        key = (id(converter), first)
        if key not in self.undone:
            self.undone[key] = self._undo(_Group(first, converter, {}))
        return next((self.undone[key][n] for n in self.names.older(name) if n in self.undone[key]), None)

    def _undo(self, group: _Group) -> dict[str, Traced]:
        reverse = group.converter.reverse_transform()
        inputs: dict[str, list[Traced]] = {}
        first = None
        for target in sorted(group.targets(), key=self.order):
            traced = self.parameter(target) if target in self.parameters else None
            renamed, pattern = reverse.rename_source_key(target)
            if traced is None or pattern is None:
                return {}
            first = first or renamed
            inputs.setdefault(pattern, []).append(traced)
        return self._convert(reverse, first, inputs)

    def _convert(self, converter: WeightConverter, first: str, inputs: dict[str, list[Traced]]) -> dict[str, Traced]:
        """Run the converter's operations on traced tensors; what comes out, by full name."""
        tensors: dict[str, Any] = inputs
        for operation in converter.operations:
            tensors = _followed(operation)(
                tensors,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=first,
                model=self.model,
                config=self.model.config,
                missing_keys=None,
            )
        name = first.replace("*.", "0.")
        before, _, after = next((name.partition(k) for k in tensors if k in name), ("", "", ""))
        return {f"{before}{k}{after}": v[0] if isinstance(v, list) else v for k, v in tensors.items()}


class _Names:
    """transformers' renaming of one set of names; some of its rules remember what they saw, so one per set."""

    def __init__(self, model: PreTrainedModel, parameters: Mapping[str, Any]):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model)
        self.prefix, self.parameters = model.base_model_prefix, parameters
        self.renamings: list[WeightRenaming] = [r for r in rules if isinstance(r, WeightRenaming)]
        self.converters: list[WeightConverter] = [r for r in rules if isinstance(r, WeightConverter)]
        self.of_pattern = {p: c for c in self.converters for p in c.source_patterns}

    def parameter_and_pattern(self, name: str) -> tuple[str, WeightConverter | None, str | None]:
        """The parameter a tensor goes to (the first, if several), by which converter, as which of its sources."""
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(name, self.renamings, self.converters, self.prefix, self.parameters)
        if renamed not in self.parameters and name in self.parameters:
            return name, None, None
        return renamed, self.of_pattern.get(pattern), pattern

    def parameter(self, name: str) -> tuple[str, WeightConverter | None]:
        return self.parameter_and_pattern(name)[:2]

    def older(self, name: str) -> list[str]:
        """What an old name is called after all renamings, with and without the base model's prefix."""
        from transformers.core_model_loading import apply_renamings

        renamed = apply_renamings(name, self.renamings)
        return [renamed, f"{self.prefix}.{renamed}", renamed.removeprefix(f"{self.prefix}.")]


def _followed(operation: Any) -> Callable[..., dict[str, Any]]:
    """The operation's own `convert`, with whatever it raises on a traced tensor told as Untraceable."""
    run = SHUFFLES.get(type(operation).__name__, lambda op: op.convert)(operation)

    def convert(tensors: dict[str, Any], **context: Any) -> dict[str, Any]:
        try:
            return run(tensors, **context)
        except AdaptKitError:
            raise
        except Exception as error:  # an operation may do anything to a tensor it does not know
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Untraceable(f"{type(operation).__name__}: {quoted(reason)}") from None

    return convert


def _rope(operation: Any) -> Callable[..., dict[str, Any]]:
    """PermuteForRope reshapes; on a vector of row numbers it says which row goes where."""
    import torch

    permute = operation._permute_for_rope
    operation = copy(operation)
    operation._permute_for_rope = lambda tensor, config: tensor.reordered(
        0, permute(torch.arange(tensor.shape[0], device="cpu"), config).tolist()
    )

    def convert(tensors: dict[str, Any], **context: Any) -> dict[str, Any]:
        return operation.convert({k: v if isinstance(v, list) else [v] for k, v in tensors.items()}, **context)

    return convert


def _interleave(operation: Any) -> Callable[..., dict[str, Any]]:
    """Interleave reshapes; on a vector of row numbers it says which row goes where."""
    import torch

    rows = deepcopy(operation)
    rows.dim = 0

    def convert(tensors: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, Any]:
        (tensor,) = tensors.values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        numbers = torch.arange(tensor.shape[operation.dim], device="cpu")
        (order,) = rows.convert({"": numbers}, [""], [""]).values()
        return {target_patterns[0]: tensor.reordered(operation.dim, order.tolist())}

    return convert


SHUFFLES = {"PermuteForRope": _rope, "Interleave": _interleave}
