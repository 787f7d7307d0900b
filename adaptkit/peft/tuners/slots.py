"""Slots: where an adapter's numbers stand on a wrapper, so that parameters have the names they have in PEFT.

q_proj.lora_A.default.weight in the model, q_proj.lora_A.weight in a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ...errors import Mismatch, Usage, quoted
from ...live.adapted import Adapted
from ...tuners.base import Tuner


class Entry(NamedTuple):
    """One number of an adapter: its path below the wrapper in the model, that in a file, and itself."""

    here: str
    saved: str
    value: nn.Parameter


class Slotted(Adapted):
    """An Adapted whose numbers stand under the names of `slots`: letter -> (attribute, leaf); no leaf: a bare parameter."""

    slots: ClassVar[dict[str, tuple[str, str]]] = {}

    def settle(self) -> None:
        self.frozen = nn.ModuleDict()  # what no file holds
        for attribute, leaf in self.slots.values():
            place, last = self._place(attribute)
            if last not in place._modules:
                setattr(place, last, nn.ModuleDict() if leaf else nn.ParameterDict())

    def put(self, name: str, params: Mapping[str, nn.Parameter]) -> None:
        for letter in params.keys() - self.slots.keys():
            if params[letter].requires_grad:
                raise Mismatch(f"this {type(self.bare()).__name__} carries adapters of another kind already")
            self._hold(name, letter, params[letter])
        for letter in (letter for letter in self.slots if letter in params):  # a weight before the bias beside it
            value, box, leaf = params[letter], self.box(letter), self.slots[letter][1]
            if not leaf:
                box[name] = self.shaped(letter, value)
                continue
            if name not in box:
                _checked(name, box)
                box[name] = self.holder(letter, value)
            setattr(box[name], leaf, self.shaped(letter, value))

    def of(self, name: str) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for letter, (_, leaf) in self.slots.items():
            box = self.box(letter)
            if name in box:
                value = getattr(box[name], leaf) if leaf else box[name]
                if value is not None:
                    found[letter] = value
        if name in self.frozen:
            found |= self.frozen[name]._buffers
        return found

    def drop(self, name: str) -> None:
        for letter in self.slots:
            if name in self.box(letter):
                del self.box(letter)[name]
        if name in self.frozen:
            del self.frozen[name]

    def entries(self, name: str) -> Iterator[Entry]:
        """Every number that a file holds of one adapter."""
        for letter, value in self.of(name).items():
            if letter in self.slots:
                attribute, leaf = self.slots[letter]
                in_file = f"{attribute}.{leaf}" if leaf and letter != "m" else attribute
                yield Entry(f"{attribute}.{name}" + (f".{leaf}" if leaf else ""), in_file, value)

    def box(self, letter: str) -> Any:
        """The dictionary of one letter's numbers, by adapter name."""
        place, last = self._place(self.slots[letter][0])
        return getattr(place, last)

    def holder(self, letter: str, value: Tensor) -> nn.Module:
        """A module to hold a weight."""
        return nn.Module()

    def shaped(self, letter: str, value: nn.Parameter) -> nn.Parameter:
        """A number in the shape that PEFT gives it."""
        return value

    def _place(self, attribute: str) -> tuple[nn.Module, str]:
        outer, _, last = attribute.rpartition(".")
        if not outer:
            return self, last
        if outer not in self._modules:
            self.add_module(outer, nn.Module())
        return self._modules[outer], last

    def _hold(self, name: str, letter: str, value: Tensor) -> None:
        if name not in self.frozen:
            self.frozen[name] = nn.Module()
        self.frozen[name].register_buffer(letter, value.detach(), persistent=False)

    # what PEFT calls things

    @property
    def merged(self) -> bool:
        """Whether any update is in the weight at the moment."""
        return bool(self.merged_adapters)

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that act, in order."""
        return list(self.active)

    active_adapter = active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether no adapter acts."""
        return not self.enabled

    def get_base_layer(self) -> nn.Module:
        """The module without adapters."""
        return self.bare()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put updates into the weight. Values that overflow are always refused."""
        from ... import live

        live.merge(self, [n for n in adapter_names if n not in self.merged_adapters] if adapter_names else None)

    def unmerge(self) -> None:
        """Give the weight back the bytes it had before."""
        from ... import live

        live.unmerge(self)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the adapters that act and train on this layer."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.active = [n for n in names if n in self.tuners]
        for name in self.tuners:
            self.train_adapter(name, name in self.active and not inference_mode)

    def train_adapter(self, name: str, trains: bool) -> None:
        """Let one adapter train, or freeze it."""
        tuner = self.tuners[name]
        for letter, value in self.of(name).items():
            if isinstance(value, nn.Parameter):
                value.requires_grad_(trains and tuner.trains(letter, value))

    def enable_adapters(self, enabled: bool) -> None:
        """Let the active adapters act, or none."""
        self.enabled = enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off this layer."""
        self.remove(adapter_name)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return super().forward(*args, **kwargs)
        self.rows, self.repeated = list(adapter_names), False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.rows = None


class Settings(Mapping):
    """One number of every tuner of a layer, by adapter name; setting it makes another tuner."""

    def __init__(self, tuners: dict[str, Tuner], get: Any, change: Any = None):
        self._tuners, self._get, self._change = tuners, get, change

    def __getitem__(self, name: str) -> Any:
        return self._get(self._tuners[name])

    def __setitem__(self, name: str, value: Any) -> None:
        if self._change is None:
            raise Usage("cannot be changed once the adapter is there")
        self._tuners[name] = self._change(self._tuners[name], value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tuners)

    def __len__(self) -> int:
        return len(self._tuners)

    def __repr__(self) -> str:
        return repr(dict(self))


def _checked(name: str, box: nn.ModuleDict) -> None:
    if hasattr(box, name):
        raise Usage(f"{quoted(name)!r} cannot be an adapter's name: torch uses it", hint="choose another name")


def linear(weight: Tensor) -> nn.Linear:
    """An nn.Linear to hold a weight. weight: (out, in)"""
    made = nn.Linear.__new__(nn.Linear)  # its own __init__ would draw numbers, which takes longer than all the rest
    nn.Module.__init__(made)
    made.out_features, made.in_features = weight.shape
    made.register_parameter("weight", None)
    made.register_parameter("bias", None)
    return made
