"""Table D, the part that a merge sees: a .bin as the adapter, and as the base."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from . import sound
from .case import ADAPTER, ADAPTER_BIN, BIN, CASES, WEIGHTS, Case, Room, case
from .payload import (
    Name,
    Reduce,
    Storage,
    archive,
    call,
    opcodes,
    payload_bin,
    pickled,
    sizes,
    state_dict,
    tensor,
    torch_zip,
    touch,
)  # fmt: skip

Make = Callable[[Room, sound.Tensors], bytes]
BOMB = 64 * 2**20


def as_adapter(room: Room, make: Make) -> None:
    (room.adapter / ADAPTER).unlink()
    (room.adapter / ADAPTER_BIN).write_bytes(make(room, sound.adapter()))


def as_base(room: Room, make: Make) -> None:
    (room.base / WEIGHTS).unlink()
    (room.base / BIN).write_bytes(make(room, sound.base()))


PLACES = {"adapter": as_adapter, "base": as_base}


def pickle_case(name: str, text: str, must: str, places: tuple[str, ...] = tuple(PLACES)) -> Callable[[Make], Make]:
    """A .bin, tried in place of the adapter's weights and of the model's."""

    def enter(make: Make) -> Make:
        for place in places:
            CASES[f"{name}/{place}"] = Case(f"{name}/{place}", text, must, _respoil(PLACES[place], make))
        return make

    return enter


def _respoil(put: Callable[[Room, Make], None], make: Make) -> Callable[[Room], None]:
    return lambda room: put(room, make)


def saved(tensors: dict, legacy: bool = False) -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(tensors, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def as_torch(tensors: sound.Tensors) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}


def members(data: bytes) -> dict[str, bytes]:
    """The members of a checkpoint, without their common folder."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name.split("/", 1)[1]: file.read(name) for name in file.namelist()}


@pickle_case("D01_os_system", "os.system", "unsafe")
def os_system(room: Room, tensors: sound.Tensors) -> bytes:
    return payload_bin(room.marker)


@pickle_case("D06_builtins_open_w", "builtins.open(marker, 'w'): truncates any file", "unsafe")
def builtins_open(room: Room, tensors: sound.Tensors) -> bytes:
    return torch_zip(pickled(call("builtins", "open", str(room.marker), "w")))


@pickle_case("D15_torch_load_from_bytes", "torch.storage._load_from_bytes: nested torch.load", "unsafe")
def load_from_bytes(room: Room, tensors: sound.Tensors) -> bytes:
    return torch_zip(pickled(opcodes(Reduce(Name("torch.storage", "_load_from_bytes"), payload_bin(room.marker)))))


@pickle_case("D22_inst_opcode", "INST opcode instead of GLOBAL", "unsafe")
def inst_opcode(room: Room, tensors: sound.Tensors) -> bytes:
    command = f"echo ran > '{room.marker}'".encode()
    return torch_zip(pickled(b"(X" + struct.pack("<I", len(command)) + command + b"ios\nsystem\n"))


@pickle_case("D26_legacy_tar_like", "legacy (not zip) stream of pickles with a payload", "unsafe")
def legacy_payload(room: Room, tensors: sound.Tensors) -> bytes:
    magic, version = pickled(opcodes(0x1950A86A20F9469CFC6C)), pickled(opcodes(1001))
    system = pickled(opcodes({"little_endian": True, "protocol_version": 1001}))
    return magic + version + system + pickled(touch(room.marker)) + pickled(b"]")


@pickle_case("D27_plain_pickle", "a bare pickle named .bin", "unsafe")
def plain_pickle(room: Room, tensors: sound.Tensors) -> bytes:
    return pickled(touch(room.marker))


@pickle_case("D28_broken_after_payload", "payload first, then garbage", "unsafe")
def broken_after_payload(room: Room, tensors: sound.Tensors) -> bytes:
    return torch_zip(b"\x80\x02" + touch(room.marker) + b"\xff\xff\xffgarbage")


@pickle_case("D29_second_stream", "clean pickle, payload in a second stream after STOP", "corrupt")
def second_stream(room: Room, tensors: sound.Tensors) -> bytes:
    return torch_zip(pickled(b"}") + pickled(touch(room.marker)))


@pickle_case("D33_zip_bad_crc", "wrong CRC on data.pkl, which holds a payload", "unsafe")
def zip_bad_crc(room: Room, tensors: sound.Tensors) -> bytes:
    data = bytearray(payload_bin(room.marker))
    data[data.index(b"PK\x03\x04") + 14] ^= 1
    data[data.index(b"PK\x01\x02") + 16] ^= 1
    return bytes(data)


@pickle_case("D38_argparse_namespace", "state dict next to an argparse.Namespace", "unsafe")
def argparse_namespace(room: Room, tensors: sound.Tensors) -> bytes:
    return torch_zip(state_dict({"args": Reduce(Name("argparse", "Namespace"))}))


@pickle_case("D50_stride_bomb", "4-float storage seen as a [1e6,1e6] tensor through stride 0", "corrupt")
def stride_bomb(room: Room, tensors: sound.Tensors) -> bytes:
    name = next(iter(tensors))
    bomb = tensor(Storage("0", 4), (10**6, 10**6), (0, 0))
    return torch_zip(state_dict({name: bomb}), {"0": bytes(16)})


@pickle_case("D51_offset_past_storage", "storage offset past the end", "corrupt")
def offset_past_storage(room: Room, tensors: sound.Tensors) -> bytes:
    return torch_zip(state_dict({next(iter(tensors)): tensor(Storage("0", 4), (4,), (1,), 2)}), {"0": bytes(16)})


@pickle_case("D54_storage_short", "storage member shorter than declared", "corrupt")
def storage_short(room: Room, tensors: sound.Tensors) -> bytes:
    return torch_zip(state_dict({next(iter(tensors)): tensor(Storage("0", 4), (4,), (1,))}), {"0": bytes(8)})


@pickle_case("D56_storage_key_traversal", "storage key ../../../data.pkl", "corrupt")
def storage_key_traversal(room: Room, tensors: sound.Tensors) -> bytes:
    evil = tensor(Storage("../../../data.pkl", 4), (4,), (1,))
    return torch_zip(state_dict({next(iter(tensors)): evil}), {"0": bytes(16)})


@pickle_case(
    "D57_cuda7_location", "storage tagged cuda:7; the adapter then lacks the other tensors", "mismatch", ("adapter",)
)
def cuda_location(room: Room, tensors: sound.Tensors) -> bytes:
    name, array = next(iter(tensors.items()))
    there = tensor(Storage("0", array.size, "cuda:7"), array.shape, sizes(array.shape))
    return torch_zip(state_dict({name: there}), {"0": array.tobytes()})


@pickle_case("D58_zip_bomb", "deflated storage that expands a thousand times", "corrupt")
def zip_bomb(room: Room, tensors: sound.Tensors) -> bytes:
    bomb = tensor(Storage("0", BOMB // 4), (BOMB // 4,), (1,))
    content = {"data.pkl": state_dict({next(iter(tensors)): bomb}), "data/0": bytes(BOMB), "version": b"3\n"}
    return archive(content, zipfile.ZIP_DEFLATED)


@pickle_case("D62_truncated_zip", "zip cut in the middle", "corrupt")
def truncated_zip(room: Room, tensors: sound.Tensors) -> bytes:
    data = saved(as_torch(tensors))
    return data[: len(data) // 2]


@pickle_case("D63_empty_bin", "0-byte .bin", "corrupt")
def empty_bin(room: Room, tensors: sound.Tensors) -> bytes:
    return b""


@pickle_case("D64_int_keys", "state dict with integer keys", "corrupt")
def int_keys(room: Room, tensors: sound.Tensors) -> bytes:
    return saved(dict(enumerate(as_torch(tensors).values())))


@pickle_case("D65_not_a_dict", "the pickle holds a list", "corrupt")
def not_a_dict(room: Room, tensors: sound.Tensors) -> bytes:
    return saved(list(as_torch(tensors).values()))


@pickle_case("D80_good_bin", "sound .bin (control)", "ok")
def good_bin(room: Room, tensors: sound.Tensors) -> bytes:
    return saved(as_torch(tensors))


@pickle_case("D80b_good_bin_by_hand", "sound .bin, written opcode by opcode (control of this generator)", "ok")
def good_bin_by_hand(room: Room, tensors: sound.Tensors) -> bytes:
    storages = {str(i): array.tobytes() for i, array in enumerate(tensors.values())}
    rebuilt = {
        name: tensor(Storage(str(i), array.size), array.shape, sizes(array.shape))
        for i, (name, array) in enumerate(tensors.items())
    }
    return torch_zip(state_dict(rebuilt), storages)


@pickle_case("D81_tied_storage", "two names share one storage", "ok", ("adapter",))
def tied_storage(room: Room, tensors: sound.Tensors) -> bytes:
    tensors[sound.a_name(sound.Q1)] = tensors[sound.a_name(sound.Q0)]
    room.expect = sound.merged(sound.base(), tensors)
    content = as_torch(tensors)
    content[sound.a_name(sound.Q1)] = content[sound.a_name(sound.Q0)]
    return saved(content)


@pickle_case("D82_views_of_one_storage", "tensors are slices of one big storage", "ok")
def views_of_one_storage(room: Room, tensors: sound.Tensors) -> bytes:
    whole = torch.cat([t.flatten() for t in as_torch(tensors).values()])
    parts = whole.split([array.size for array in tensors.values()])
    return saved({name: part.view(tensors[name].shape) for name, part in zip(tensors, parts, strict=True)})


@pickle_case("D83_noncontiguous", "transposed view", "ok")
def noncontiguous(room: Room, tensors: sound.Tensors) -> bytes:
    return saved({name: t.T.contiguous().T if t.ndim == 2 else t for name, t in as_torch(tensors).items()})


@pickle_case("D84_nested_state_dict", 'wrapped in {"state_dict": ..., "epoch": 3}', "warn")
def nested_state_dict(room: Room, tensors: sound.Tensors) -> bytes:
    return saved({"state_dict": as_torch(tensors), "epoch": 3})


@pickle_case("D85_sparse", "a sparse tensor", "mismatch")
def sparse(room: Room, tensors: sound.Tensors) -> bytes:
    content = as_torch(tensors)
    name = next(iter(content))
    return saved(content | {name: content[name].to_sparse()})


@pickle_case("D86_complex", "a complex tensor that nothing adapts", "ok", ("base",))
def complex_tensor(room: Room, tensors: sound.Tensors) -> bytes:
    table = np.arange(4, dtype=np.complex64)
    room.expect["rope.freqs_cis"] = table
    return saved(as_torch(tensors) | {"rope.freqs_cis": torch.from_numpy(table)})


@pickle_case("D87_deflated_zip", "same content in a deflated zip", "ok")
def deflated_zip(room: Room, tensors: sound.Tensors) -> bytes:
    return archive(members(saved(as_torch(tensors))), zipfile.ZIP_DEFLATED)


@pickle_case("D88_legacy_format", "legacy serialization (not zip), sound", "ok")
def legacy_format(room: Room, tensors: sound.Tensors) -> bytes:
    return saved(as_torch(tensors), legacy=True)


@pickle_case("D89_big_endian_mark", "byteorder record says big", "corrupt")
def big_endian_mark(room: Room, tensors: sound.Tensors) -> bytes:
    return archive(members(saved(as_torch(tensors))) | {"byteorder": b"big"})


@pickle_case("D90_bitflip_data", "one bit flipped in a storage: zip CRC disagrees", "corrupt")
def bitflip_data(room: Room, tensors: sound.Tensors) -> bytes:
    data = bytearray(saved(as_torch(tensors)))
    data[data.index(next(iter(tensors.values())).tobytes()) + 5] ^= 16
    return bytes(data)


@pickle_case("D91_nonstring_name", "name with a lone surrogate", "corrupt")
def surrogate_name(room: Room, tensors: sound.Tensors) -> bytes:
    return saved(as_torch(tensors) | {"x\udc80": torch.ones(2)})


@case("D92_bin_shards", "pytorch_model.bin.index.json and three shards", "ok")
def bin_shards(room: Room) -> None:
    (room.base / WEIGHTS).unlink()
    shards = {f"{Path(n).stem}.bin": part for n, part in sound.in_shards(sound.base()).items()}
    for name, part in shards.items():
        (room.base / name).write_bytes(saved(as_torch(part)))
    room.write_index(sound.index_of(shards))
    (room.base / "model.safetensors.index.json").rename(room.base / "pytorch_model.bin.index.json")
