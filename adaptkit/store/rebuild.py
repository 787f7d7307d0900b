"""What torch.save writes for a tensor: the calls in its pickles, read as a dtype, a shape and a place in a storage.

ALLOWED is every name that such a pickle may hold; all others are refused by name (symbolic.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import Corrupt, Mismatch, quoted
from .entry import BITS
from .symbolic import HINT, Call, Name, Stored, Table

DTYPES = {
    "float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL", "complex64": "C64",
    "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "uint16": "U16", "uint32": "U32",
    "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
STORAGES = {
    "Float": ("F32", 4), "Double": ("F64", 8), "Half": ("F16", 2), "BFloat16": ("BF16", 2), "Bool": ("BOOL", 1),
    "Byte": ("U8", 1), "Char": ("I8", 1), "Short": ("I16", 2), "Int": ("I32", 4), "Long": ("I64", 8),
    "ComplexFloat": ("C64", 8), "ComplexDouble": ("complex128", 16), "QInt8": ("qint8", 1), "QUInt8": ("quint8", 1),
    "QInt32": ("qint32", 4), "QUInt4x2": ("quint4x2", 1), "QUInt2x4": ("quint2x4", 1),
}  # fmt: skip
HOMES = ("torch", "torch.cuda", "torch.storage")
KINDS = {f"{home}.{kind}Storage": found for kind, found in STORAGES.items() for home in HOMES}
KINDS |= {f"torch.storage.{kind}Storage": ("U8", 1) for kind in ("Untyped", "Typed")}

# functions that torch.save writes: how many arguments a tensor has, and where its dtype is, if it is told
PLAIN = {"torch._utils._rebuild_tensor": 4, "torch._utils._rebuild_tensor_v2": 6, "torch._utils._rebuild_tensor_v3": 7}
PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
TYPED = "torch._tensor._rebuild_from_type_v2"  # (function, type, arguments, attributes)
TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.Parameter"}
OTHER = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without data (device meta)",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a device that stores NumPy arrays",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a device of its own",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
    **dict.fromkeys(TYPES, "a tensor that torch.save did not write"),
}
QUIET = {  # mere data, seen in sound checkpoints; without a meaning for tensors
    *(f"torch.{name}" for name in (*DTYPES, "complex128", "complex32", "float", "double", "half", "int", "long")),
    *(f"torch.{name}" for name in ("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")),
    *(f"torch.per_{name}" for name in ("tensor_affine", "channel_affine", "tensor_symmetric", "channel_symmetric")),
    *(f"torch.{name}" for name in ("qint8", "quint8", "qint32", "quint4x2", "quint2x4", "float4_e2m1fn_x2")),
    *(f"builtins.{name}" for name in ("set", "frozenset", "bytearray", "complex")),
    *(f"__builtin__.{name}" for name in ("set", "frozenset", "bytearray", "complex")),
    *(f"numpy.{home}.multiarray.scalar" for home in ("core", "_core")),
    *("numpy.dtype", "_codecs.encode", "torch.device", "torch.serialization._get_layout", "torch.Size"),
    *("collections.OrderedDict", "collections.Counter"),
}  # fmt: skip
TENSORS = {*PLAIN, *PARAMETERS, TYPED, *OTHER}
ALLOWED = QUIET | TENSORS | set(KINDS) | TYPES
METADATA = (
    "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata TensorProperties ChunkStorageMetadata StorageMeta "
    "_MEM_FORMAT_ENCODING"
).split()
TRAINING = ALLOWED | {  # what training frameworks pickle beside tensors: classes whose instances are looked at as data
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in METADATA),
    *(f"torch.distributed.checkpoint.filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")),
    *(f"pathlib.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")),
    *(f"pathlib._local.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")),
    *(f"deepspeed.runtime.fp16.loss_scaler.{name}" for name in ("LossScaler", "DynamicLossScaler")),
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    *(f"deepspeed.utils.tensor_fragment.{name}" for name in ("fragment_address", "tensor_fragment")),
}
AXES = 64


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as the pickle tells it. offset and strides in elements."""

    storage: Stored
    dtype: str
    width: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def is_tensor(value: Any) -> bool:
    """Whether a call gives a tensor, of a kind we can read or not."""
    return isinstance(value, Call) and value.name in TENSORS


def viewed(value: Any) -> View:
    """What a call of a torch function would give."""
    for _ in range(4):  # a parameter around a tensor with attributes around a tensor
        if not isinstance(value, Call) or not value.args:
            break
        if value.name in PARAMETERS:
            value = value.args[0]
        elif value.name == TYPED:
            value = _typed(value.args)
    if isinstance(value, Call) and value.name in OTHER:
        raise Mismatch(f"is {OTHER[value.name]}, which is not supported", hint="save it as an ordinary tensor")
    if not isinstance(value, Call) or len(value.args) < PLAIN.get(value.name, 1 << 30):
        raise Corrupt("is not a tensor as torch writes it")
    return _plain(value)


def _typed(args: tuple) -> Call:
    match args:
        case (Name(function), Name(kind), tuple(given), _) if kind in TYPES:
            return Call(function, given)
        case (Name(), Name(kind), tuple(), _):
            raise Mismatch(f"is of the tensor type {quoted(kind)}, which is not supported")
    raise Corrupt("is not a tensor as torch writes it")


def _plain(call: Call) -> View:
    storage, offset, shape, strides, *more = call.args
    if not isinstance(storage, Stored) or storage.kind not in KINDS:
        raise Corrupt("has no storage")
    shape, strides = _sizes(shape), _sizes(strides)
    tuples = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= AXES
    if not tuples or not _counts((offset, *shape, *strides)):
        raise Corrupt("has a shape, strides or an offset that no tensor has")
    dtype, width = KINDS[storage.kind]
    if call.name.endswith("_v3"):
        dtype, width = _told_dtype(more[2])
        more = more[:2] + more[3:]
    if any(isinstance(bits, Table) and bits.items for bits in more[2:]):
        raise Mismatch("is a conjugate or negative view", hint="save it after .resolve_conj().resolve_neg()")
    if dtype not in BITS:
        raise Mismatch(f"has dtype {dtype}, which safetensors cannot hold")
    return View(storage, dtype, width, offset, shape, strides)


def _sizes(value: Any) -> Any:
    """The tuple in a torch.Size, or what is given."""
    return value.args[0] if isinstance(value, Call) and value.name == "torch.Size" and value.args else value


def _told_dtype(dtype: Any) -> tuple[str, int]:
    if not isinstance(dtype, Name):
        raise Corrupt("has no dtype")
    name = dtype.name.removeprefix("torch.")
    if name not in DTYPES:
        raise Mismatch(f"has dtype {quoted(name)}, which is not supported")
    return DTYPES[name], BITS[DTYPES[name]] // 8


def nbytes(storage: Stored) -> int:
    """The size of a storage. Raises Corrupt, or Mismatch for a kind that cannot be read."""
    if storage.kind not in KINDS or not _counts((storage.numel,)):
        raise Corrupt(f"the storage {quoted(storage.key)!r} has type {quoted(storage.kind)} and a length that is none")
    if storage.view is not None:
        raise Mismatch(f"the storage {quoted(storage.key)!r} is a view of another one (torch before 0.4)", hint=HINT)
    return storage.numel * KINDS[storage.kind][1]


def _counts(numbers: tuple) -> bool:
    return all(type(n) is int and 0 <= n < 2**63 for n in numbers)
