"""A model folder as a live module: no code of strangers, and no number that the folder does not hold."""

from __future__ import annotations

import gc
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import AdaptKitError, Corrupt, Mismatch, quoted, some
from .task import Task
from .trace import quiet

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
UNUSED = ("pooler.",)  # heads of an encoder that its features can do without


def load(folder: Path, task: Task, dtype: str, changed: Collection[str] = ()) -> nn.Module:
    """The model of a folder, for a task, ready to run. Numbers stay in the mapped file where their dtype is theirs.

    changed: tensors that an adapter changed, which must not be left out.
    Raises Mismatch when no class of transformers fits, the folder lacks tensors of the task's head, the task has no
    place for a changed one, or a number is too large for float16; Corrupt when shapes are not those of config.json, or a
    number is NaN and float16 is asked for (checking finds it otherwise).
    """
    import transformers

    auto = getattr(transformers, task.auto)
    try:
        with quiet(), torch.no_grad():
            model, info = auto.from_pretrained(
                folder, dtype=DTYPES[dtype], trust_remote_code=False, use_safetensors=True, local_files_only=True,
                output_loading_info=True, return_dict=True,
            )  # fmt: skip
    except AdaptKitError:
        raise
    except (ValueError, OSError, ImportError, KeyError, RuntimeError, TypeError, AttributeError, ArithmeticError) as e:
        if "ignore_mismatched_sizes" in str(e):  # that is advice to fill the gaps at random
            raise Corrupt("tensors have other shapes than config.json says", where=folder) from e
        raise Mismatch(f"transformers does not load it for {task.name}: {_line(e)}", where=folder) from e
    _whole(model, info, folder, task)
    if lost := sorted(set(changed) & set(map(str, info.get("unexpected_keys", ())))):
        text = f"{task.name} leaves out {some(lost)}, which the adapter brings"
        raise Mismatch(text, where=folder, hint="choose the task it was trained for with --task")
    if dtype == "float16":
        _fits(model, folder)
    return model.eval().requires_grad_(False)


def _whole(model: nn.Module, info: dict[str, Any], folder: Path, task: Task) -> None:
    """Raises Mismatch for numbers that would be made up."""
    missing = sorted(map(str, info.get("missing_keys", ())))
    if task.name == "feature-extraction":
        poolers = [k for k in missing if any(k.startswith(p) or f".{p}" in k for p in UNUSED)]
        missing = [k for k in missing if k not in poolers]
        if poolers:
            model.adaptkit_without = ("pooler_output",)
    if missing:
        hint = "is it trained for another task? choose it with --task"
        raise Mismatch(f"holds no {some(missing)}, which {task.name} needs", where=folder, hint=hint)


def _fits(model: nn.Module, folder: Path) -> None:
    """Raises Corrupt for numbers that are none, Mismatch for those that became infinite when they were cast to float16."""
    large = {n: p for n, p in model.named_parameters() if not p.sum(dtype=torch.float32).isfinite()}
    if none := [n for n, p in large.items() if p.isnan().any()]:
        raise Corrupt(f"{some(none)} holds NaN", where=folder, hint="take another copy of the model")
    if large:
        text = f"numbers of {some(large)} are too large for float16"
        raise Mismatch(text, where=folder, hint="use --dtype float32")


def unload(model: nn.Module) -> None:
    """Let the numbers of a model that `load` made go, whoever still holds it; nobody may read them again."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.new_empty(0)
    gc.collect()


def _line(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return quoted(lines[0] if lines else type(e).__name__)
