"""AdaptKit: from a trained adapter to a model that ships. Each name is imported from its home on first use."""

from __future__ import annotations

import importlib

HOMES = {
    "Adapter": "adapter", "Site": "adapter", "AdaptKitError": "errors", "AdaptKitWarning": "errors", "Corrupt": "errors",
    "Format": "formats.base", "Note": "formats.base", "fold": "formats.fold", "appearing": "formats.base", "Select": "select", "Tuner": "tuners.base", "registry": "registry",
    "Checkpoint": "store.checkpoint", "open_checkpoint": "store.checkpoint", "read": "formats.base",
    "LoRA": "tuners.lora", "DoRA": "tuners.dora", "IA3": "tuners.ia3",
    "PromptTuning": "tuners.virtual", "PTuning": "tuners.virtual", "PrefixTuning": "tuners.virtual",
    "merge": "verbs.merge", "unmerge": "verbs.unmerge", "verify": "verbs.verify", "inspect": "verbs.inspect",
    "extract": "verbs.extract",
    "combine": "verbs.combine", "resize": "verbs.resize",
    "convert": "verbs.convert", "export_onnx": "verbs.export_onnx",
    "attach": "live.attach", "detach": "live.attach", "write": "formats.base", "live": "live",
    "pull": "verbs.pull", "push": "verbs.push", "targets": "verbs.targets", "plan": "verbs.plan", "plugins": "verbs.plugins",
}  # fmt: skip
__all__ = sorted(HOMES)


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'adaptkit' has no attribute {name!r}")
    home = importlib.import_module(f".{HOMES[name]}", __name__)
    return home if name in ("registry", "live", "fold") else getattr(home, name)


def __dir__() -> list[str]:
    return __all__
