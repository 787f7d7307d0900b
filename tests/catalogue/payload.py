"""Torch checkpoints made to be bad: zip and pickle written opcode by opcode, so nothing is run when they are made."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path


def call(module: str, name: str, *arguments: str) -> bytes:
    """The pickle that calls module.name(*arguments) and leaves the answer on the stack, without PROTO and STOP."""
    texts = b"".join(b"X" + struct.pack("<I", len(a.encode())) + a.encode() for a in arguments)
    return f"c{module}\n{name}\n".encode() + b"(" + texts + b"tR"


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def touch(marker: Path) -> bytes:
    """A call that leaves the marker."""
    return call("os", "system", f"echo ran > '{marker}'")


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip in the shape of torch.save."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, data in members.items():
            file.writestr(f"archive/{name}", data)
    return stream.getvalue()


def torch_zip(pickle_bytes: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    """A checkpoint with this data.pkl and these storages."""
    members = {"data.pkl": pickle_bytes, "byteorder": b"little"}
    members |= {f"data/{key}": data for key, data in (storages or {}).items()}
    return archive(members | {"version": b"3\n"})


def payload_bin(marker: Path) -> bytes:
    """A checkpoint that runs a command when it is unpickled."""
    return torch_zip(pickled(touch(marker)))


class Name:
    """A global to be written into a pickle by name, without importing it."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Reduce:
    """callable(*arguments), to be written into a pickle."""

    def __init__(self, function: Name, *arguments: object):
        self.function, self.arguments = function, arguments


class Storage:
    """A persistent id, as torch writes it for a storage of float32."""

    def __init__(self, key: str, numel: int, location: str = "cpu"):
        self.id = ("storage", Name("torch", "FloatStorage"), key, location, numel)


def tensor(storage: Storage, shape: tuple, strides: tuple, offset: int = 0) -> Reduce:
    """One tensor as torch.save writes it."""
    hooks = Reduce(Name("collections", "OrderedDict"))
    return Reduce(Name("torch._utils", "_rebuild_tensor_v2"), storage, offset, shape, strides, False, hooks)


def opcodes(value: object) -> bytes:
    """The opcodes that build a value of the few kinds above."""
    if isinstance(value, Name):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Reduce):
        return opcodes(value.function) + opcodes(value.arguments) + b"R"
    if isinstance(value, Storage):
        return opcodes(value.id) + b"Q"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(opcodes, value)) + b"t"
    if isinstance(value, dict):
        return b"}(" + b"".join(opcodes(x) for pair in value.items() for x in pair) + b"u"
    return pickle.dumps(value, 2)[2:-1]


def state_dict(tensors: dict[str, object]) -> bytes:
    return pickled(opcodes(tensors))


def sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The row-major strides of a shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return tuple(strides)
