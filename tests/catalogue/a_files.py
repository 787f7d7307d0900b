"""Table A: the structure of a safetensors file."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable

import ml_dtypes
import numpy as np

from . import sound
from .case import ADAPTER, CASES, WEIGHTS, Case, Room, case
from .sound import Header, as_text, framed

MANY = 50_000
Spoil = Callable[[Header, bytes], bytes]
PLACES = {
    "single": ("single", lambda room: room.base / WEIGHTS),
    "shard": ("sharded", lambda room: room.shard(2)),
    "adapter": ("single", lambda room: room.adapter / ADAPTER),
}


def broken(name: str, text: str, places: tuple[str, ...] = tuple(PLACES)) -> Callable[[Spoil], Spoil]:
    """A corrupt file, tried as the only file of the model, as the second of three shards, and as the adapter."""

    def enter(spoil: Spoil) -> Spoil:
        for place in places:
            layout, path = PLACES[place]
            CASES[f"{name}/{place}"] = Case(f"{name}/{place}", text, "corrupt", _respoil(spoil, path), layout)
        return spoil

    return enter


def _respoil(spoil: Spoil, path: Callable) -> Callable[[Room], None]:
    def build(room: Room) -> None:
        whole = path(room).read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        path(room).write_bytes(spoil(json.loads(whole[8 : 8 + length]), whole[8 + length :]))

    return build


def names(header: Header) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def entry(header: Header, number: int) -> dict:
    """The entry of the number-th tensor, to be changed in place."""
    return header[names(header)[number]]


def repacked(header: Header, data: bytes) -> bytes:
    return framed(as_text(header), data)


def text_of(pairs: list[tuple[str, object]]) -> bytes:
    """A JSON object that may have one key twice."""
    return b"{" + b",".join(json.dumps(k).encode() + b":" + json.dumps(v).encode() for k, v in pairs) + b"}"


@broken("A01_empty_file", "0 bytes")
def empty_file(header: Header, data: bytes) -> bytes:
    return b""


@broken("A02_seven_bytes", "shorter than the length field")
def seven_bytes(header: Header, data: bytes) -> bytes:
    return b"\x10\0\0\0\0\0\0"


@broken("A03_header_len_zero", "header length 0")
def header_len_zero(header: Header, data: bytes) -> bytes:
    return struct.pack("<Q", 0) + data


@broken("A04_header_len_past_end", "header length past the end of the file")
def header_len_past_end(header: Header, data: bytes) -> bytes:
    whole = repacked(header, data)
    return struct.pack("<Q", len(whole)) + whole[8:]


@broken("A05_header_len_u64_max", "header length 2**64-1")
def header_len_u64_max(header: Header, data: bytes) -> bytes:
    return struct.pack("<Q", 2**64 - 1) + repacked(header, data)[8:]


@case("A06_header_100MB_sparse", "header length 100 000 001 and a matching sparse file", "corrupt")
def header_100mb_sparse(room: Room) -> None:
    with open(room.base / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(8 + 100_000_001)


@broken("A07_header_not_utf8", "header is not UTF-8")
def header_not_utf8(header: Header, data: bytes) -> bytes:
    return framed(as_text(header).replace(b"weight", b"w\xff\xfeght", 1), data)


@broken("A08_header_not_json", "header is not JSON")
def header_not_json(header: Header, data: bytes) -> bytes:
    return framed(b"{this is not JSON}", data)


@broken("A09_header_is_list", "header JSON is a list")
def header_is_list(header: Header, data: bytes) -> bytes:
    return framed(b"[1,2,3]", data)


@broken("A10_header_len_small", "header length lies: 16 bytes short")
def header_len_small(header: Header, data: bytes) -> bytes:
    text = as_text(header)
    return struct.pack("<Q", len(text) - 16) + text + data


@broken("A11_data_one_byte_short", "last byte missing")
def data_one_byte_short(header: Header, data: bytes) -> bytes:
    return repacked(header, data[:-1])


@broken("A12_data_half", "half of the data missing (cut download)")
def data_half(header: Header, data: bytes) -> bytes:
    return repacked(header, data[: len(data) // 2])


@broken("A13_trailing_bytes_polyglot", "zip appended after the data")
def trailing_zip(header: Header, data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    return repacked(header, data) + stream.getvalue()


@broken("A14_overlapping_offsets", "two tensors share bytes")
def overlapping_offsets(header: Header, data: bytes) -> bytes:
    for number in range(1, len(names(header))):
        begin, end = entry(header, number)["data_offsets"]
        entry(header, number)["data_offsets"] = [begin - 16, end - 16]
    return repacked(header, data[:-16])


@broken("A15_hole", "16 unclaimed bytes before the first tensor")
def hole(header: Header, data: bytes) -> bytes:
    for number in range(len(names(header))):
        begin, end = entry(header, number)["data_offsets"]
        entry(header, number)["data_offsets"] = [begin + 16, end + 16]
    return repacked(header, bytes(16) + data)


@broken("A16_reversed_offsets", "end before begin")
def reversed_offsets(header: Header, data: bytes) -> bytes:
    entry(header, 0)["data_offsets"].reverse()
    return repacked(header, data)


@broken("A17_negative_offset", "negative offset")
def negative_offset(header: Header, data: bytes) -> bytes:
    begin, end = entry(header, 0)["data_offsets"]
    entry(header, 0)["data_offsets"] = [begin - 8, end - 8]
    return repacked(header, data)


@broken("A18_offset_past_end", "offsets past the end of the file")
def offset_past_end(header: Header, data: bytes) -> bytes:
    begin, end = entry(header, -1)["data_offsets"]
    entry(header, -1)["data_offsets"] = [begin + 4096, end + 4096]
    return repacked(header, data)


@broken("A19_size_disagrees", "shape x dtype != byte range")
def size_disagrees(header: Header, data: bytes) -> bytes:
    entry(header, 0)["shape"][0] += 1
    return repacked(header, data)


@broken("A20_shape_overflow", "shape product overflows 64 bits")
def shape_overflow(header: Header, data: bytes) -> bytes:
    entry(header, 0)["shape"] = [2**40, 2**40]
    return repacked(header, data)


@broken("A21_duplicate_key_same", "one tensor name twice, same entry")
def duplicate_key_same(header: Header, data: bytes) -> bytes:
    return framed(text_of([*header.items(), (names(header)[0], entry(header, 0))]), data)


@broken("A22_duplicate_keys_swap", "two names twice, second entries swapped: two readings", ("single", "adapter"))
def duplicate_keys_swap(header: Header, data: bytes) -> bytes:
    one, two = (n for n in header if "q_proj" in n and "lora_B" not in n)
    return framed(text_of([*header.items(), (one, header[two]), (two, header[one])]), data)


@broken("A23_unknown_dtype", 'dtype "Q7"')
def unknown_dtype(header: Header, data: bytes) -> bytes:
    entry(header, 0)["dtype"] = "Q7"
    return repacked(header, data)


@broken("A24a_negative_dim", "negative dimension")
def negative_dim(header: Header, data: bytes) -> bytes:
    entry(header, 0)["shape"][0] *= -1
    return repacked(header, data)


@broken("A24b_float_dim", "float dimension")
def float_dim(header: Header, data: bytes) -> bytes:
    entry(header, 0)["shape"][0] *= 1.0
    return repacked(header, data)


@broken("A24c_string_shape", "shape is a string")
def string_shape(header: Header, data: bytes) -> bytes:
    entry(header, 0)["shape"] = "64x64"
    return repacked(header, data)


@broken("A25_entry_without_offsets", "entry without data_offsets")
def entry_without_offsets(header: Header, data: bytes) -> bytes:
    del entry(header, 0)["data_offsets"]
    return repacked(header, data)


@broken("A26_metadata_not_strings", "__metadata__ with a number and a list")
def metadata_not_strings(header: Header, data: bytes) -> bytes:
    return repacked(header | {"__metadata__": {"format": "pt", "epoch": 3, "tags": ["a"]}}, data)


@broken("A28_deep_json", "header nested 200 000 levels")
def deep_json(header: Header, data: bytes) -> bytes:
    return framed(b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}", data)


@broken("A31_header_leading_space", "header starts with a space (spec: must start with {)")
def header_leading_space(header: Header, data: bytes) -> bytes:
    return framed(b" " + as_text(header), data)


@broken("A33_empty_name", "tensor with an empty name")
def empty_name(header: Header, data: bytes) -> bytes:
    return repacked({("" if k == names(header)[-1] else k): v for k, v in header.items()}, data)


@broken("A41_lfs_pointer", "git-lfs pointer text instead of the weights")
def lfs_pointer(header: Header, data: bytes) -> bytes:
    oid = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 380256\n".encode()


@broken("A42_html_page", "HTML error page saved as .safetensors")
def html_page(header: Header, data: bytes) -> bytes:
    return b"<!DOCTYPE html>\n<html><head><title>504 Gateway Time-out</title></head><body></body></html>\n"


@broken("A43_gzip", "gzip data")
def gzip_data(header: Header, data: bytes) -> bytes:
    return gzip.compress(repacked(header, data), mtime=0)


@broken("A47_bitflip_header", "one bit flipped in a shape in the header")
def bitflip_header(header: Header, data: bytes) -> bytes:
    whole = bytearray(repacked(header, data))
    whole[whole.index(b'"shape":[') + len(b'"shape":[')] ^= 1
    return bytes(whole)


for _place, (_layout, _path) in PLACES.items():

    @case(f"A39_directory/{_place}", "the weights file is a directory", "corrupt", _layout)
    def directory(room: Room, path: Callable = _path) -> None:
        path(room).unlink()
        path(room).mkdir()

    @case(f"A40_fifo/{_place}", "the weights file is a FIFO: must not hang", "corrupt", _layout)
    def fifo(room: Room, path: Callable = _path) -> None:
        path(room).unlink()
        os.mkfifo(path(room))


@case("A29_zero_d_weight", "a projection weight is a 0-d tensor", "mismatch")
def zero_d_weight(room: Room) -> None:
    room.write_model(sound.base() | {f"{sound.Q0}.weight": np.array(1, np.float32)}, expect={})


@case("A30_zero_rows_weight", "a projection weight has shape [0, 64]", "mismatch")
def zero_rows_weight(room: Room) -> None:
    room.write_model(sound.base() | {f"{sound.Q0}.weight": np.zeros((0, 64), np.float32)}, expect={})


@case("A34_hostile_name", "extra tensor whose name has ESC, newline, NUL, RTL mark and ../", "warn")
def hostile_name(room: Room) -> None:
    room.write_model(sound.base() | {"../x\x1b[31m\n\0\u202eevil.weight": np.ones(4, np.float32)})


@case("A35_million_entries", f"{MANY:,} zero-size tensors", "warn")
def many_entries(room: Room) -> None:
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = {f"z.{i}": nothing for i in range(MANY)} | sound.header_of(sound.base())
    (room.base / WEIGHTS).write_bytes(repacked(header, sound.data_of(sound.base())))


@case("A36_subbyte_dtype", "target weight stored as F8_E4M3", "mismatch")
def float8_weight(room: Room) -> None:
    model = sound.base()
    model[f"{sound.Q0}.weight"] = model[f"{sound.Q0}.weight"].astype(ml_dtypes.float8_e4m3fn)
    room.write_model(model, expect={})


@case("A37_unaligned_header", "header length not a multiple of 8 (valid file)", "ok")
def unaligned_header(room: Room) -> None:
    text = as_text(sound.header_of(sound.base()))
    text += b" " * (3 - len(text) % 8)
    (room.base / WEIGHTS).write_bytes(framed(text, sound.data_of(sound.base()), pad=1))


@case("A38_metadata_format_missing", "no __metadata__ at all (valid file)", "ok")
def no_metadata(room: Room) -> None:
    header = sound.header_of(sound.base())
    del header["__metadata__"]
    (room.base / WEIGHTS).write_bytes(repacked(header, sound.data_of(sound.base())))


@case("A38b_metadata_format_tf", '__metadata__ says format "tf"', "ok")
def metadata_format_tf(room: Room) -> None:
    (room.base / WEIGHTS).write_bytes(sound.packed(sound.base(), {"format": "tf"}))


@case("A44_zero_filled", "right size and header, data all zero (crash after preallocation)", "warn")
def zero_filled(room: Room) -> None:
    room.write_model({name: np.zeros_like(array) for name, array in sound.base().items()})


@case("A45_nan_base", "NaN in a base weight", "warn")
def nan_base(room: Room) -> None:
    model = sound.base()
    model[f"{sound.Q0}.weight"][3, 5] = np.nan
    room.write_model(model)


@case("A46_inf_base_untouched", "Inf in a base weight that the adapter does not touch: bits must be kept", "warn")
def inf_base_untouched(room: Room) -> None:
    model = sound.base()
    model["model.layers.0.mlp.down_proj.weight"][3, 5] = np.inf
    room.write_model(model)
