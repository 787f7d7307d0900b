"""What a model is exported for: the head that its settings name, or the one that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import Mismatch, Usage, quoted, some


@dataclass(frozen=True)
class Task:
    """A task by its name at the Hub.

    kind: "decoder", "encoder" or "seq2seq", the shape of its graphs.    auto: the class of transformers that loads it.
    ending: of the architectures that are made for it.
    """

    name: str
    kind: str
    auto: str
    ending: str


TASKS = {
    task.name: task
    for task in (
        Task("text-generation", "decoder", "AutoModelForCausalLM", "ForCausalLM"),
        Task("text2text-generation", "seq2seq", "AutoModelForSeq2SeqLM", "ForConditionalGeneration"),
        Task("automatic-speech-recognition", "seq2seq", "AutoModelForSpeechSeq2Seq", "ForConditionalGeneration"),
        Task("text-classification", "encoder", "AutoModelForSequenceClassification", "ForSequenceClassification"),
        Task("token-classification", "encoder", "AutoModelForTokenClassification", "ForTokenClassification"),
        Task("question-answering", "encoder", "AutoModelForQuestionAnswering", "ForQuestionAnswering"),
        Task("fill-mask", "encoder", "AutoModelForMaskedLM", "ForMaskedLM"),
        Task("image-classification", "encoder", "AutoModelForImageClassification", "ForImageClassification"),
        Task("zero-shot-image-classification", "encoder", "AutoModelForZeroShotImageClassification", "CLIPModel"),
        Task("feature-extraction", "encoder", "AutoModel", "Model"),
    )
}
OTHER_WORDS = {
    "causal-lm": "text-generation",
    "text-generation-with-past": "text-generation",
    "seq2seq": "text2text-generation",
    "sequence-classification": "text-classification",
    "embedding": "feature-extraction",
    "sentence-similarity": "feature-extraction",
    "speech": "automatic-speech-recognition",
}
AUDIO = ("whisper", "speech_to_text", "moonshine")
PAIRS = ("clip", "siglip", "chinese_clip", "clipseg")  # a model of texts and images side by side


def named(task: str) -> Task:
    """The task of a name. Raises Usage for one that is not known."""
    found = TASKS.get(OTHER_WORDS.get(task, task))
    if found is None:
        raise Usage(f"{quoted(task)!r} is not a task", where="--task", hint=f"one of {', '.join(TASKS)}")
    return found


def task_of(config: Mapping[str, Any], asked: str | None = None) -> Task:
    """The task of a model by its config.json, unless one was asked for. Raises Mismatch when nothing says which."""
    if asked:
        return _suited(named(asked), config)
    architectures = [str(a) for a in config.get("architectures") or []]
    for name in architectures:
        if found := _of(name, config):
            return found
    if not architectures:
        raise Mismatch("config.json names no architecture", where="architectures", hint="say what for with --task")
    raise Mismatch(f"{some(architectures)} is made for no task that can be exported", hint=f"known: {', '.join(TASKS)}")


def _of(architecture: str, config: Mapping[str, Any]) -> Task | None:
    family = str(config.get("model_type", ""))
    if architecture.endswith("ForConditionalGeneration"):
        return _conditional(architecture, family, config)
    if architecture.endswith(("LMHeadModel", "ForCausalLM")):
        return TASKS["text-generation"]
    if architecture.endswith("Model"):
        return TASKS["zero-shot-image-classification" if family in PAIRS else "feature-extraction"]
    return next((t for t in TASKS.values() if architecture.endswith(t.ending)), None)


def _conditional(architecture: str, family: str, config: Mapping[str, Any]) -> Task:
    if family in AUDIO:
        return TASKS["automatic-speech-recognition"]
    if not config.get("is_encoder_decoder"):
        raise Mismatch(
            f"{quoted(architecture)} reads images or sound beside text, which needs a graph for each part",
            hint="export its text model, when it is a model of its own",
        )
    return TASKS["text2text-generation"]


def _suited(task: Task, config: Mapping[str, Any]) -> Task:
    """The task, when the model can have it: an encoder-decoder has no graph of one part, and the other way round."""
    two = bool(config.get("is_encoder_decoder"))
    if task.kind == "seq2seq" and not two:
        raise Mismatch(f"{quoted(config.get('model_type'))} is no encoder-decoder", where=f"--task {task.name}")
    if task.kind == "decoder" and two:
        raise Mismatch(
            f"{quoted(config.get('model_type'))} is an encoder-decoder", where=f"--task {task.name}",
            hint="use text2text-generation",
        )  # fmt: skip
    return task
