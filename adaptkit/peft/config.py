"""LoraConfig and IA3Config: PEFT's fields and defaults. What is not supported is refused, never ignored."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any

from ..errors import Mismatch, Usage, quoted
from ..formats.peft.config import read_config
from .files import CONFIG, folder_of, write_json
from .kinds import PeftType, TaskType, task

Names = list[str] | set[str] | str
BIASES = ("none", "all", "lora_only")


@dataclass
class PeftConfig:
    """What all adapters have in common."""

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, str] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        self.task_type = task(self.task_type)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **hub: Any
    ) -> PeftConfig:
        """The settings of a saved adapter, as the class of their kind."""
        raw = read_config(folder_of(pretrained_model_name_or_path, subfolder, hub) / CONFIG)
        from .prompts.config import CONFIGS  # which stands on this file

        kinds = {"LORA": LoraConfig, "IA3": IA3Config} | {k.value: v for k, v in CONFIGS.items()}
        if raw["peft_type"] not in kinds:
            raise Mismatch(f"peft_type {quoted(raw['peft_type'])} is not there yet; {' and '.join(kinds)} are")
        kind = kinds[raw["peft_type"]]
        known = {f.name for f in fields(kind)}
        return kind(**{k: v for k, v in raw.items() if k in known and v is not None})

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write adapter_config.json into a folder."""
        write_json(Path(save_directory) / CONFIG, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the adapter is made of virtual tokens."""
        return False


@dataclass
class _Targeted(PeftConfig):
    target_modules: Names | None = None
    exclude_modules: Names | None = None
    fan_in_fan_out: bool = False  # set from the modules themselves
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_modules, self.exclude_modules = _set(self.target_modules), _set(self.exclude_modules)
        for name in ("target_modules", "exclude_modules"):
            rule = getattr(self, name)
            if not isinstance(rule, (str, type(None))) and not (isinstance(rule, set) and all(map(_is_name, rule))):
                raise Usage(f"{name} is {rule!r}; it is a pattern, or a list of names")
        if isinstance(self.modules_to_save, (set, tuple)):
            self.modules_to_save = list(self.modules_to_save)
        if isinstance(self.modules_to_save, str):
            raise Usage("modules_to_save is a list of names")


# fields of PEFT's LoraConfig that must be left as they are
OFF = (
    "megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "alora_invocation_tokens", "use_qalora", "monteclora_config", "layer_replication", "use_bdlora", "arrow_config",
    "kasa_config", "ensure_weight_tying",
)  # fmt: skip
STARTS = (True, False, "gaussian", "orthogonal", "pissa", "olora")
NITER = re.compile(r"pissa_niter_(\d+)")


@dataclass
class LoraConfig(_Targeted):
    """LoRA, rsLoRA and DoRA."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_dora: bool = False
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        for name in OFF:
            if getattr(self, name):
                raise Mismatch(f"{name} is not there yet")
        if self.bias not in BIASES:
            raise Usage(f"bias is {self.bias!r}, it is one of {', '.join(BIASES)}")
        self._start()
        self._numbers()
        self._parameters()
        self._layers()

    def _start(self) -> None:
        start = self.init_lora_weights
        start = self.init_lora_weights = start.lower() if isinstance(start, str) else start
        if start not in STARTS and not NITER.fullmatch(str(start)):
            raise Mismatch(
                f"init_lora_weights={start!r} is not there; {', '.join(map(repr, STARTS))} and 'pissa_niter_N' are"
            )
        if self.lora_bias and start not in (True, False):
            raise Usage(f"lora_bias goes with init_lora_weights True or False, not with {start!r}")

    def _parameters(self) -> None:
        if isinstance(self.target_parameters, str):
            raise Usage("target_parameters is a list of names")
        off = [n for n in ("lora_dropout", "lora_bias", "use_dora") if getattr(self, n)]
        if self.target_parameters and off:
            raise Usage(f"{off[0]} does not go with target_parameters: a bare parameter has no input of its own")
        if self.use_dora and self.lora_bias:
            raise Usage("lora_bias does not go with use_dora")

    def _numbers(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise Usage(f"{name} is {getattr(self, name)!r}, it says a number for each pattern: {{'.*q_proj': 16}}")
        for name, r in {"r": self.r, **self.rank_pattern}.items():
            if type(r) is not int or r < 1:
                raise Usage(f"{quoted(name)} is {r!r}, a rank is a whole number from 1")
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if isinstance(alpha, bool) or not isinstance(alpha, Real):
                raise Usage(f"{quoted(name)} is {alpha!r}, an alpha is a number")
        if not isinstance(self.lora_dropout, Real) or not 0 <= self.lora_dropout < 1:
            raise Usage(f"lora_dropout is {self.lora_dropout!r}, it lies between 0 and 1")

    def _layers(self) -> None:
        for name in ("layers_to_transform", "trainable_token_indices"):
            given = getattr(self, name)
            lists = given.values() if isinstance(given, dict) and name != "layers_to_transform" else [given]
            if not all(_whole(one, alone=name == "layers_to_transform") for one in lists):
                raise Usage(f"{name} is {given!r}; it is a list of whole numbers")
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise Usage("layers_to_transform and layers_pattern go with a list of target_modules, not with a pattern")
        if self.layers_pattern and self.layers_to_transform is None:
            raise Usage("layers_pattern needs layers_to_transform")


@dataclass
class IA3Config(_Targeted):
    """(IA)^3."""

    feedforward_modules: Names | None = None
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.IA3
        self.feedforward_modules = _set(self.feedforward_modules)
        both = isinstance(self.target_modules, set) and isinstance(self.feedforward_modules, set)
        if lost := sorted(self.feedforward_modules - self.target_modules) if both else []:
            raise Usage(f"feedforward_modules names {', '.join(lost)}, which target_modules does not")


def _whole(value: Any, alone: bool) -> bool:
    """Whether a setting is left out, or a list of whole numbers, or one of them."""
    if value is None or (alone and type(value) is int):
        return True
    return isinstance(value, (list, tuple, set, range)) and all(type(i) is int for i in value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _set(names: Any) -> Any:
    return set(names) if isinstance(names, (list, tuple)) else names
