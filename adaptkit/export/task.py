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
TRAINED = {  # what PEFT says an adapter was trained for, and the tasks that this may be
    "SEQ_CLS": ("text-classification", "image-classification"),
    "TOKEN_CLS": ("token-classification",),
    "QUESTION_ANS": ("question-answering",),
    "CAUSAL_LM": ("text-generation",),
    "SEQ_2_SEQ_LM": ("text2text-generation", "automatic-speech-recognition"),
    "FEATURE_EXTRACTION": ("feature-extraction", "zero-shot-image-classification"),
}
ALIKE = {"text-classification", "token-classification"}  # heads of one name and shape: each loads as the other
AUDIO = ("whisper", "speech_to_text", "moonshine")
PAIRS = ("clip", "siglip", "chinese_clip", "clipseg")  # a model of texts and images side by side


def named(task: str) -> Task:
    """The task of a name. Raises Usage for one that is not known."""
    found = TASKS.get(OTHER_WORDS.get(task, task))
    if found is None:
        raise Usage(f"{quoted(task)!r} is not a task", where="--task", hint=f"one of {', '.join(TASKS)}")
    return found


def task_of(config: Mapping[str, Any], asked: str | None = None, trained: Mapping[str, str] | None = None) -> Task:
    """The task of a model by its config.json, unless one was asked for.

    trained: what each adapter was trained for, in PEFT's words.
    Raises Mismatch when nothing says which task, or config.json and an adapter say different ones.
    """
    kinds = dict(trained or {})
    if asked:
        return _suited(named(asked), config, kinds)
    found = own_task(config)
    if found is None and not _architectures(config):
        hint = "say what for with --task"
        raise Mismatch("names no architecture", where="config.json", hint=hint)
    if found is None:
        what = some(_architectures(config))
        raise Mismatch(f"{what} is made for no task that can be exported", hint=f"known: {', '.join(TASKS)}")
    for name, kind in kinds.items():
        if found.name not in TRAINED.get(kind, (found.name,)):
            both = "" if _swaps(kind, found) else f" or --task {found.name}"
            hint = f"say which with --task {TRAINED[kind][0]}{both}"
            raise Mismatch(
                f"was trained for {quoted(kind)}, the model's config.json says {found.name}", where=name, hint=hint
            )
    return found


def own_task(config: Mapping[str, Any]) -> Task | None:
    """The task that config.json says. Raises Mismatch for a model that needs a graph for each part."""
    return next((found for name in _architectures(config) if (found := _of(name, config))), None)


def _architectures(config: Mapping[str, Any]) -> list[str]:
    found = config.get("architectures")
    return [a for a in found if isinstance(a, str)] if isinstance(found, list) else []


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


def _swaps(kind: str, task: Task) -> bool:
    """Whether a head that was trained for something else would load as the task's."""
    return task.name in ALIKE and task.name not in TRAINED.get(kind, ()) and bool(ALIKE & {*TRAINED.get(kind, ())})


def _suited(task: Task, config: Mapping[str, Any], kinds: Mapping[str, str]) -> Task:
    """The task, when the model can have it: an encoder-decoder has no graph of one part, and the other way round."""
    for name, kind in kinds.items():
        if _swaps(kind, task):
            hint = "leave it out, or correct task_type in adapter_config.json"
            raise Mismatch(f"{quoted(name)} was trained for {quoted(kind)}", where=f"--task {task.name}", hint=hint)
    brought = any(task.name in TRAINED.get(kind, ()) for kind in kinds.values())
    own = next((t for t in TASKS.values() if any(a.endswith(t.ending) for a in _architectures(config))), None)
    if own and not brought and {own.name, task.name} == ALIKE:
        text = f"config.json says {own.name}, and its head would be taken for another"
        raise Mismatch(text, where=f"--task {task.name}", hint="leave it out")
    two = bool(config.get("is_encoder_decoder"))
    if task.kind == "seq2seq" and not two:
        raise Mismatch(f"{quoted(config.get('model_type'))} is no encoder-decoder", where=f"--task {task.name}")
    if task.kind == "decoder" and two:
        raise Mismatch(
            f"{quoted(config.get('model_type'))} is an encoder-decoder", where=f"--task {task.name}",
            hint="use text2text-generation",
        )  # fmt: skip
    return task
