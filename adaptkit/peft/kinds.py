"""TaskType and PeftType: the words that stand in adapter_config.json."""

from __future__ import annotations

from enum import Enum

from ..errors import Usage, quoted


class PeftType(str, Enum):
    """What kind of adapter."""

    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    IA3 = "IA3"


class TaskType(str, Enum):
    """What the model is for; it chooses the class of the wrapped model."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def task(value: str | None) -> TaskType | None:
    """A task by its name. Raises Usage with the names there are."""
    if value is None or isinstance(value, TaskType):
        return value
    if value not in TaskType.__members__:
        raise Usage(f"task_type is {quoted(value)!r}, the tasks are {', '.join(TaskType.__members__)}")
    return TaskType(value)
