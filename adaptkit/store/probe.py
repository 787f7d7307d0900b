"""What a model does with token ids that it does not do with their embeddings. Found by running it on no numbers at all.

PEFT hands a model inputs_embeds = [P; embedding(ids)]. A row in the embedding gives the same exactly when the model
computes on ids what it computes on inputs_embeds, after a lookup that it may scale. Both are run on the meta device up
to the first layer, and their operations are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import Mismatch, quoted
from .metamodel import meta_model

if TYPE_CHECKING:
    from torch import nn

SCALES = (
    "scalar_embed_scale",
    "embed_scale",
)  # what transformers calls the factor of an embedding that scales its rows
REARRANGED = ("aten.view.", "aten._unsafe_view.", "aten.alias.", "aten.detach.")
LENGTH = 5  # tokens of the rehearsal


class _Reached(Exception):
    """The first layer was called."""


def row_scale(config: Mapping[str, Any]) -> tuple[float, bool]:
    """The factor that the model's embedding applies to a row it looks up, and whether it is first cast to the row's dtype.

    Raises Mismatch when ids and embeddings do not mean the same to the model, or when it cannot be told.
    """
    kind = quoted(config.get("model_type"))
    model = meta_model(config).eval()
    embedding = model.get_input_embeddings()
    if embedding is None:
        raise Mismatch(f"a {kind} model names no input embedding, so no row of it can hold a virtual token")
    try:
        ids, inner = _operations(model, embedding, by_ids=True)
        embeds, _ = _operations(model, embedding, by_ids=False)
    except Exception as e:
        text = (
            f"a {kind} model cannot be rehearsed ({type(e).__name__}), so it is not known what it does with token ids"
        )
        raise Mismatch(text, hint="serve the prompt as an adapter") from e
    if not inner or ids != embeds:
        text = f"a {kind} model does more with token ids than look them up, so no row equals a virtual token"
        raise Mismatch(text, hint="serve the prompt as an adapter")
    return _scale(embedding, inner, kind)


def _scale(embedding: nn.Module, operations: list[tuple], kind: str) -> tuple[float, bool]:
    """The factor, when the lookup is a lookup or a lookup times a number."""
    rest = [name for name, *_ in operations if not name.startswith(("aten.embedding.", "aten._to_copy."))]
    if not rest:
        return 1.0, False
    value = next((getattr(embedding, name) for name in SCALES if hasattr(embedding, name)), None)
    if rest != ["aten.mul.Tensor"] or not isinstance(value, (int, float)):
        raise Mismatch(
            f"the embedding of a {kind} model changes its rows in a way that is not known ({type(embedding).__name__})",
            hint="serve the prompt as an adapter",
        )
    factor = next(args[1] for name, args, _ in operations if name == "aten.mul.Tensor")
    return float(value), isinstance(factor, tuple)


def _operations(model: nn.Module, embedding: nn.Module, by_ids: bool) -> tuple[list[tuple], list[tuple]]:
    """(operations up to the first layer, those inside the embedding)."""
    import torch

    recorder = _recorder()
    ids = torch.zeros((1, LENGTH), dtype=torch.long, device="meta")
    inputs = {"input_ids": ids} if by_ids else {"inputs_embeds": embedding(ids)}
    with _stopping(model), _inside(embedding, recorder), torch.no_grad(), recorder:
        try:
            # with a mask, as generate gives one: without it some models look for padding among the ids, to warn of it
            model(**inputs, attention_mask=torch.ones_like(ids), use_cache=False)
        except _Reached:
            return recorder.outer, recorder.inner
    raise RuntimeError("no layer was called")


def _recorder() -> Any:
    """A mode of torch that writes down every operation; built here because its base class is torch's."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.outer: list[tuple] = []
            self.inner: list[tuple] = []
            self.looking_up = False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not (str(func).startswith(REARRANGED) and args[0].dtype == torch.long):  # ids laid out anew stay ids
                (self.inner if self.looking_up else self.outer).append((str(func), _plain(args), _plain(kwargs or {})))
            if func is torch.ops.aten._local_scalar_dense.default:  # a question about numbers: both runs get one answer
                return True if args[0].dtype == torch.bool else 0
            return func(*args, **(kwargs or {}))

    return Recorder()


def _plain(value: Any) -> Any:
    """Arguments that can be compared: tensors by shape and dtype."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _plain(v)) for k, v in sorted(value.items()))
    return str(value)


@contextmanager
def _inside(embedding: nn.Module, recorder: Any):
    """Tells the recorder while the embedding works."""
    hooks = [
        embedding.register_forward_pre_hook(lambda *_: setattr(recorder, "looking_up", True)),
        embedding.register_forward_hook(lambda *_: setattr(recorder, "looking_up", False)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _stopping(model: nn.Module):
    """Stops a model when the first of its layers is called."""
    from torch import nn

    def reached(*_: Any) -> None:
        raise _Reached

    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    hooks = [block.register_forward_pre_hook(reached) for blocks in lists for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
