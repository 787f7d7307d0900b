"""Pickles read as text: what a pickle would build, without building it.

The machine knows the opcodes and four kinds of value: plain ones, Table (a dict), Call (what a function would have
been given) and Stored (a piece of the file). A name outside the allowlist ends the reading. Nothing is imported.
The format: CPython's pickletools.py.
"""

from __future__ import annotations

import codecs
import re
import struct
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from ..errors import Corrupt, Unsafe, quoted

LARGEST = 1 << 26  # bytes of pickle: fifty thousand tensors take 6 MB, settings beside them may take more
LONGEST = 1 << 20  # of a line of text
MOST = 2_500_000  # opcodes: fifty thousand tensors
WIDEST = 256  # bytes of one integer
EMPTY = "the pickle is damaged (it takes a value that is not there)"
HINT = "get a .safetensors version"
REPR = re.compile(rb"""(?:[^\\]|\\[\\'"nrt]|\\x[0-9a-fA-F]{2})*""")
DATA = ("argparse", "datetime", "decimal", "enum", "fractions", "pathlib", "types", "uuid")  # stdlib homes of mere data


@dataclass(frozen=True, slots=True)
class Name:
    """A name that the pickle asks for."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A name, what it would have been called with, and what would have been set on the result."""

    name: str
    args: tuple
    states: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor storage. kind: its type, "torch.FloatStorage".   key, numel: which one, how many elements."""

    kind: str
    key: str
    numel: Any
    view: Any


@dataclass(slots=True, eq=False)
class Table:
    """A dict as the list of its pairs: keys are never hashed, as a hash can take for ever."""

    items: list[tuple[Any, Any]] = field(default_factory=list)


class Stream:
    """A file from which at most `left` bytes may be taken."""

    def __init__(self, file: BinaryIO, left: int, largest: int | None = None):
        self.file, self.left = file, min(left, largest or LARGEST)

    def take(self, n: int) -> bytes:
        data = self.file.read(n) if n <= self.left else b""
        if len(data) != n:
            raise Corrupt(f"the pickle is cut short or too long ({n:,} bytes wanted, {self.left:,} left)")
        self.left -= n
        return data

    def line(self) -> bytes:
        line = self.file.readline(min(self.left, LONGEST))
        if not line.endswith(b"\n"):
            raise Corrupt("the pickle is cut short in a line of text")
        self.left -= len(line)
        return line[:-1].rstrip(b"\r")


class Machine:
    """One pickle. `stored` lists the storages it names."""

    def __init__(self, stream: Stream, allowed: Collection[str], most: int | None = None):
        self.stream, self.allowed, self.most = stream, allowed, most or MOST
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.stored: list[Stored] = []
        self.copied = 0

    def run(self) -> Any:
        """The value at the end of the pickle. Raises Corrupt, or Unsafe for a name that is not allowed."""
        take = self.stream.take
        try:
            for _ in range(self.most):
                if (op := take(1)) == b".":
                    return self.pop()
                if (step := STEPS.get(op)) is None:
                    raise Corrupt(f"the pickle is damaged ({op} is no opcode)")
                step(self)
        except (KeyError, ValueError) as e:
            raise Corrupt(f"the pickle is damaged ({type(e).__name__} {quoted(e)})") from None
        raise Corrupt(f"the pickle has more than {self.most:,} opcodes")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise Corrupt(EMPTY)
        return self.stack.pop()

    def pops(self, n: int) -> list[Any]:
        """The topmost values."""
        if len(self.stack) < n:
            raise Corrupt(EMPTY)
        values = self.stack[-n:]
        del self.stack[-n:]
        return values

    def top(self) -> Any:
        if not self.stack:
            raise Corrupt(EMPTY)
        return self.stack[-1]

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        """The values since the last mark."""
        if not self.marks:
            raise Corrupt("the pickle is damaged (it goes back to a mark that is not there)")
        values, self.stack = self.stack, self.marks.pop()
        return values

    # what is read from the stream

    def number(self, width: int, signed: bool = False) -> int:
        return int.from_bytes(self.stream.take(width), "little", signed=signed)

    def long(self, width: int) -> int:
        if (n := self.number(width)) > WIDEST:
            raise Corrupt(f"the pickle has an integer of {n:,} bytes")
        return self.number(n, signed=True)

    def digits(self) -> int | bool:
        text = self.stream.line()
        if len(text) > WIDEST:
            raise Corrupt(f"the pickle has an integer of {len(text):,} digits")
        return text == b"01" if text in (b"00", b"01") else int(text.rstrip(b"L"), 0)

    def data(self, width: int) -> bytes:
        return self.stream.take(self.number(width))

    def text(self, width: int) -> str:
        return self.data(width).decode("utf-8", "surrogatepass")  # a bad name is reported later, by name

    def oldstr(self, raw: bytes) -> str | bytes:
        """A str of Python 2."""
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw

    def repr(self) -> str | bytes:
        text = self.stream.line().strip()
        if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"') or not REPR.fullmatch(text[1:-1]):
            raise Corrupt("the pickle is damaged (a string that is not quoted as Python 2 quotes)")
        return self.oldstr(codecs.escape_decode(text[1:-1])[0])

    def protocol(self) -> None:
        if (version := self.number(1)) > 5:
            raise Corrupt(f"the pickle has protocol {version}")

    # containers and the memo

    def append(self, values: list[Any]) -> None:
        if not isinstance(target := self.top(), list):
            raise Corrupt("the pickle is damaged (it appends to what is not a list)")
        target.extend(values)

    def assign(self, flat: list[Any]) -> None:
        """Pairs for a dict; what is set in any other object has no meaning here."""
        target = self.top()
        if not isinstance(target, Table | Call):
            raise Corrupt("the pickle is damaged (it sets an item of what is not a dict)")
        if isinstance(target, Table):
            target.items += pairs(flat)

    def build(self) -> None:
        """Attributes: noted, and only the readers of training checkpoints look at them."""
        state, target = self.pop(), self.top()
        if not isinstance(target, Table | Call | Name):
            raise Corrupt("the pickle is damaged (it sets attributes of what has none)")
        if isinstance(target, Call):
            target.states.append(state)

    def put(self, slot: int) -> None:
        if not 0 <= slot <= LARGEST:
            raise Corrupt(f"the pickle uses memo slot {slot:,}")
        self.memo[slot] = self.top()

    # names, calls, storages

    def resolve(self, name: str) -> None:
        if name not in self.allowed:
            raise refusal(name)
        self.push(Name(name))

    def line_name(self) -> None:
        module, name = self.stream.line(), self.stream.line()
        self.resolve(f"{module.decode()}.{name.decode()}")

    def stack_name(self) -> None:
        module, name = self.pops(2)
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Corrupt("the pickle is damaged (a name that is not text)")
        self.resolve(f"{module}.{name}")

    def call(self, function: Any, args: Any) -> None:
        if not isinstance(function, Name):
            raise Unsafe("refused, the pickle calls something that has no name; nothing was run", hint=HINT)
        if not isinstance(args, tuple):
            raise Corrupt(f"the pickle is damaged ({quoted(function.name)} without arguments)")
        self.push(self.ordered(args) if function.name == "collections.OrderedDict" else Call(function.name, args))

    def ordered(self, args: tuple) -> Table:
        """OrderedDict(): empty, or made from a list of pairs as Python 2 wrote it. One list may be used many times."""
        rows = args[0] if len(args) == 1 else []
        if (
            len(args) > 1
            or not isinstance(rows, list)
            or not all(isinstance(r, list | tuple) and len(r) == 2 for r in rows)
        ):
            raise Corrupt("the pickle is damaged (an OrderedDict that is not made of pairs)")
        self.copied += len(rows)
        if self.copied > MOST:
            raise Corrupt(f"the pickle copies more than {MOST:,} values")
        return Table([tuple(r) for r in rows])

    def instance(self) -> None:
        args = tuple(self.marked())
        self.line_name()
        self.call(self.pop(), args)

    def object(self) -> None:
        function, *args = self.marked() or [None]
        self.call(function, tuple(args))

    def extension(self) -> None:
        raise Unsafe("refused, the pickle calls from the extension registry; nothing was run", hint=HINT)

    def persistent(self, given: Any) -> None:
        """Only a storage may be asked for: ("storage", type, key, location, numel, view of another)."""
        fits = (
            type(given) is tuple and len(given) in (5, 6) and isinstance(given[1], Name) and isinstance(given[2], str)
        )
        if not fits or not isinstance(given[0], str) or given[0] != "storage":
            raise Unsafe(
                "refused, the pickle asks for an object that is not a tensor storage; nothing was run", hint=HINT
            )
        self.stored.append(Stored(given[1].name, given[2], given[4], given[5] if len(given) == 6 else None))
        self.push(self.stored[-1])


def pairs(flat: list[Any]) -> list[tuple[Any, Any]]:
    """[k, v, k, v] as pairs."""
    if len(flat) % 2:
        raise Corrupt("the pickle is damaged (a key without a value)")
    return list(zip(flat[::2], flat[1::2], strict=True))


def refusal(name: str) -> Unsafe:
    """The reason not to go on: a function is called, a class is held."""
    root, last = name.partition(".")[0], name.rpartition(".")[2]
    if last[:1].isupper() and (root in DATA or root not in sys.stdlib_module_names):
        return Unsafe(f"refused, the pickle holds {quoted(name)}, which is not tensor data", hint=HINT)
    return Unsafe(f"refused, the pickle calls {quoted(name)}; nothing was run", hint=HINT)


STEPS: dict[bytes, Callable[[Machine], Any]] = {
    b"\x80": Machine.protocol,
    b"\x95": lambda m: m.number(8),  # FRAME: a hint for buffering
    b"0": lambda m: m.pop() if m.stack else m.marked(),
    b"1": Machine.marked,
    b"2": lambda m: m.push(m.top()),
    b"(": Machine.mark,
    # plain values
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": lambda m: m.push(m.digits()),
    b"L": lambda m: m.push(m.digits()),
    b"J": lambda m: m.push(m.number(4, signed=True)),
    b"K": lambda m: m.push(m.number(1)),
    b"M": lambda m: m.push(m.number(2)),
    b"\x8a": lambda m: m.push(m.long(1)),
    b"\x8b": lambda m: m.push(m.long(4)),
    b"F": lambda m: m.push(float(m.stream.line())),
    b"G": lambda m: m.push(struct.unpack(">d", m.stream.take(8))[0]),
    b"S": lambda m: m.push(m.repr()),
    b"T": lambda m: m.push(m.oldstr(m.data(4))),
    b"U": lambda m: m.push(m.oldstr(m.data(1))),
    b"V": lambda m: m.push(m.stream.line().decode("raw-unicode-escape")),
    b"X": lambda m: m.push(m.text(4)),
    b"\x8c": lambda m: m.push(m.text(1)),
    b"\x8d": lambda m: m.push(m.text(8)),
    b"B": lambda m: m.push(m.data(4)),
    b"C": lambda m: m.push(m.data(1)),
    b"\x8e": lambda m: m.push(m.data(8)),
    b"\x96": lambda m: m.push(m.data(8)),
    # containers
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.marked()),
    b"a": lambda m: m.append(m.pops(1)),
    b"e": lambda m: m.append(m.marked()),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.marked())),
    b"\x85": lambda m: m.push(tuple(m.pops(1))),
    b"\x86": lambda m: m.push(tuple(m.pops(2))),
    b"\x87": lambda m: m.push(tuple(m.pops(3))),
    b"}": lambda m: m.push(Table()),
    b"d": lambda m: m.push(Table(pairs(m.marked()))),
    b"s": lambda m: m.assign(m.pops(2)),
    b"u": lambda m: m.assign(m.marked()),
    b"\x8f": lambda m: m.push(Call("builtins.set", ())),
    b"\x90": Machine.marked,  # what is in a set has no meaning here
    b"\x91": lambda m: m.push(Call("builtins.frozenset", tuple(m.marked()))),
    # the memo
    b"g": lambda m: m.push(m.memo[m.digits()]),
    b"h": lambda m: m.push(m.memo[m.number(1)]),
    b"j": lambda m: m.push(m.memo[m.number(4)]),
    b"p": lambda m: m.put(m.digits()),
    b"q": lambda m: m.put(m.number(1)),
    b"r": lambda m: m.put(m.number(4)),
    b"\x94": lambda m: m.put(len(m.memo)),
    # names and calls
    b"c": Machine.line_name,
    b"\x93": Machine.stack_name,
    b"R": lambda m: m.call(*m.pops(2)),
    b"\x81": lambda m: m.call(*m.pops(2)),
    b"\x92": lambda m: m.call(*m.pops(3)[:2]),
    b"i": Machine.instance,
    b"o": Machine.object,
    b"b": Machine.build,
    b"\x82": Machine.extension,
    b"\x83": Machine.extension,
    b"\x84": Machine.extension,
    b"P": lambda m: m.persistent(m.stream.line()),
    b"Q": lambda m: m.persistent(m.pop()),
}
