"""AutoPeftModel and its kin: the base model named in an adapter's settings, and the adapter on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from ..errors import Mismatch, Usage, quoted
from .config import PeftConfig
from .files import HUB, folder_of
from .kinds import TaskType
from .model import PeftModel

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


class AutoPeftModel:
    """Any task: the base's class stands in the settings, where PEFT wrote it because no task said more."""

    task: ClassVar[TaskType | None] = None
    base: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The base model and the adapter on it.

        revision: of the adapter; that of the base stands in the settings.    kwargs: to the base's from_pretrained,
        those that speak of the Hub or of a subfolder to the adapter's as well.

        Raises Usage when the settings are for another task, or name no base; Mismatch for a base whose class is unknown.
        """
        subfolder = kwargs.pop("subfolder", None)
        hub = {k: v for k, v in kwargs.items() if k in HUB} | ({"revision": revision} if revision else {})
        folder = folder_of(pretrained_model_name_or_path, subfolder, hub)
        settings = config or PeftConfig.from_pretrained(folder)
        if cls.task is not settings.task_type:
            told = "no task" if settings.task_type is None else settings.task_type.value
            wanted = "no task" if cls.task is None else cls.task.value
            raise Usage(f"the adapter is for {told}, {cls.__name__} is for {wanted}", where=folder)
        if not settings.base_model_name_or_path:
            raise Usage("its settings name no base model", where=folder, hint="load the base, then PeftModel")
        made = _class(settings, cls.base, folder).from_pretrained(
            settings.base_model_name_or_path, **kwargs, **({"revision": settings.revision} if settings.revision else {})
        )
        _grown(made, folder)
        kind = {"adapter_name": adapter_name, "is_trainable": is_trainable, "config": config}
        return PeftModel.from_pretrained(made, folder, **kind)


def _class(settings: PeftConfig, name: str | None, folder: Path) -> Any:
    """The class that loads the base. It is one of transformers': a stranger's settings name no other code."""
    import transformers

    mapping = settings.auto_mapping or {}
    name = name or mapping.get("base_model_class")
    library = str(mapping.get("parent_library", "transformers")).partition(".")[0]
    if not name or library != "transformers" or not isinstance(getattr(transformers, name, None), type):
        raise Mismatch(
            f"the base's class is {quoted(name)} of {quoted(library)}, which is not one of transformers'",
            where=folder,
            hint="load the base, then PeftModel",
        )
    return getattr(transformers, name)


def _grown(model: Any, folder: Path) -> None:
    """As in PEFT: a tokenizer beside the adapter that has more tokens than the base has rows makes the base grow."""
    if not any((folder / name).exists() for name in TOKENIZER):
        return
    from transformers import AutoTokenizer

    size = len(AutoTokenizer.from_pretrained(folder))
    if size > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(size)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """A language model."""

    task, base = TaskType.CAUSAL_LM, "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """An encoder and decoder."""

    task, base = TaskType.SEQ_2_SEQ_LM, "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """A classifier of sequences."""

    task, base = TaskType.SEQ_CLS, "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """A classifier of tokens."""

    task, base = TaskType.TOKEN_CLS, "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """A reader that answers questions."""

    task, base = TaskType.QUESTION_ANS, "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """An encoder."""

    task, base = TaskType.FEATURE_EXTRACTION, "AutoModel"
