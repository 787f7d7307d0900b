"""attach and detach for virtual tokens: the site "", which is the whole model."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from ..adapter import Adapter, Site
from ..errors import Mismatch, quoted
from ..store.arrays import load
from ..tuners.base import Tuner
from ..tuners.virtual import PrefixTuning, PromptTuning, PTuning
from .adapted import key
from .dimensions import dimensions
from .encoders import Rows, mlp
from .virtual import Acting, Virtual, check

HOME = "virtual_tokens"  # the module of the model that holds them


class Standing(nn.Module):
    """The virtual tokens of a model by adapter name. As on an adapted module: params, tuners, active, enabled."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.params = nn.ModuleDict()
        self.tuners: dict[str, Tuner] = {}
        self.active: list[str] = []
        self.enabled = True
        self.virtual = Virtual(model, self.acting)

    def names(self) -> Collection[str]:
        """The sets that are here."""
        return self.tuners

    def acting(self) -> Acting | None:
        """What acts at this moment. Raises Mismatch when two sets of virtual tokens are active."""
        if not self.enabled or not self.active:
            return None
        if len(self.active) > 1:
            raise Mismatch(f"{len(self.active)} sets of virtual tokens are active", hint="set_active one of them")
        name = self.active[0]
        return Acting(self.tuners[name].name, self.tuners[name].tokens, self.params[key(name)].rows)

    def remove(self, name: str) -> Site:
        """Take one off, with the rows that its encoder makes."""
        P = self.params.pop(key(name)).rows().detach().clone()
        self.active = [n for n in self.active if n != name]
        return Site(self.tuners.pop(name), {"P": P})


def standing(model: nn.Module) -> Standing | None:
    """The virtual tokens of a model, if it has any."""
    found = getattr(model, HOME, None)
    return found if isinstance(found, Standing) else None


def meant(tuner: Tuner | Adapter) -> bool:
    """Whether these are virtual tokens. Raises Mismatch for an adapter that is more than that."""
    if not isinstance(tuner, Adapter):
        return isinstance(tuner, PromptTuning)
    if "" not in tuner.sites or not isinstance(tuner.sites[""].tuner, PromptTuning):
        return False
    if len(tuner.sites) > 1 or tuner.whole:
        raise Mismatch("virtual tokens and adapted or replaced modules in one adapter", hint="attach them one by one")
    return True


def stand(model: nn.Module, tuner: Tuner | Adapter, name: str) -> None:
    """Put virtual tokens before a model: fresh ones, or those of an adapter."""
    site = tuner.sites[""] if isinstance(tuner, Adapter) else Site(tuner, {})
    check(model, site.tuner.name)
    made = _given(model, site) if site.params else _fresh(model, site.tuner)
    if (here := standing(model)) is None:
        here = Standing(model)
        model.add_module(HOME, here)
    here.params[key(name)] = made.to(next(model.parameters()).device)
    here.tuners[name] = site.tuner
    here.active = [name]


def leave(model: nn.Module, name: str) -> Adapter:
    """Take virtual tokens off; with the last of them the model is as it was."""
    here = standing(model)
    adapter = Adapter(sites={"": here.remove(name)}, about=_about(model))
    if not here.tuners:
        here.virtual.remove()
        delattr(model, HOME)
    return adapter


def _fresh(model: nn.Module, tuner: Tuner) -> Rows:
    """Prompt tuning starts as words of the model, the others at random."""
    width = _width(model, tuner)
    made = Rows(tuner.tokens, width)
    if isinstance(tuner, PTuning):
        made.mlp_head = mlp(width, width)
    elif not isinstance(tuner, PrefixTuning):
        words = model.get_input_embeddings()
        with torch.no_grad():
            ids = torch.randint(0, words.num_embeddings, (tuner.tokens,), device=words.weight.device)
            made.embedding.weight.copy_(words(ids))
    return made


def _given(model: nn.Module, site: Site) -> Rows:
    P = torch.as_tensor(load(site.params["P"], "f4"))
    width = _width(model, site.tuner)
    if P.ndim != 2 or len(P) < site.tuner.tokens or P.shape[1] != width:
        raise Mismatch(
            f"{quoted(site.tuner.name)} is {list(P.shape)}, the model takes [{site.tuner.tokens}, {width}]",
            hint="is it made for another model?",
        )
    made = Rows(*P.shape)
    with torch.no_grad():
        made.embedding.weight.copy_(P)
    return made


def _width(model: nn.Module, tuner: Tuner) -> int:
    if not isinstance(tuner, PrefixTuning):
        return model.get_input_embeddings().weight.shape[1]
    size = dimensions(model)
    return 2 * size.layers * size.kv_heads * size.head_width


def _about(model: nn.Module) -> dict[str, str]:
    """What a file needs to know of the model, for PEFT to put the tokens where they were."""
    if not model.can_generate():
        return {}
    return {"task_type": "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"}
