"""The names people know: code written for PEFT runs with only the import changed. LoRA, rsLoRA, DoRA and (IA)^3."""

from . import tuners
from .auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from .config import IA3Config, LoraConfig, PeftConfig
from .kinds import PeftType, TaskType
from .model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForSeq2SeqLM,
    get_peft_model,
)
from .state import get_peft_model_state_dict, set_peft_model_state_dict
from .tuner import IA3Model, LoraModel
from .tuners import lora
from .tuners.lora import LoraLayer

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "LoraLayer",
    "lora",
    "tuners",
    "IA3Config",
    "IA3Model",
    "LoraConfig",
    "LoraModel",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForSeq2SeqLM",
    "PeftType",
    "TaskType",
    "get_peft_model",
    "get_peft_model_state_dict",
    "set_peft_model_state_dict",
]
