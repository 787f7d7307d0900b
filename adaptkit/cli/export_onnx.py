"""adaptkit export-onnx"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import click

from . import words
from .progress import bar


@click.command("export-onnx")
@click.argument("model")
@click.argument("adapters", nargs=-1, metavar="[ADAPTER]...")
@partial(words.output, required=False)
@words.weights
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Numbers to write; float32 when left out."
)
@click.option(
    "--quantize",
    type=click.Choice(["int8", "int8_weight_only", "int4"]),
    help="Quantise the graphs, and say how much that changes. int8 rounds activations as well, the others weights only.",
)
@click.option(
    "--task",
    metavar="TASK",
    help="What the model is for, such as text-generation; read from config.json when left out.",
)
@click.option("--swappable", is_flag=True, help="Keep adapters beside the graph, to be changed while it runs.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the graphs are checked.",
)
@click.option(
    "--opset", type=int, metavar="N", help="Of ONNX, 18 to 23; 20 when left out, which the most runtimes read."
)
@click.option("--no-verify", is_flag=True, help="Do not compare the graphs with torch.")
@click.option("--overwrite", is_flag=True, help="Replace OUT when it exists, in one step at the end.")
@click.option("--dry-run", is_flag=True, help="Say what would be made, and write nothing.")
@words.printing
def command(model: str, adapters: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> None:
    """Export a model as ONNX graphs, with adapters merged into it on the way.

    MODEL is a folder or a Hub id, ADAPTER a folder, file or Hub id. OUT holds model.onnx, model.onnx_data, the settings and
    the tokenizer; an encoder-decoder has three graphs. The graphs are compared with torch before OUT appears: other
    sizes, padding, a growing cache, 20 greedy tokens. With --swappable, each ADAPTER becomes a .onnx_adapter file beside the
    graph; virtual tokens are built into it.

    \b
    Examples:
      adaptkit export-onnx llama/ my-lora/ -o llama-onnx/
      adaptkit export-onnx llama/ support/ legal/ -o llama-onnx/ --swappable
      adaptkit export-onnx minilm/ -o minilm-onnx/ --quantize int8
      adaptkit export-onnx user/whisper-small -o whisper-onnx/ --dtype float16
    """
    from ..verbs.export_onnx import export_onnx

    with bar("exporting", not quiet and not as_json) as progress:
        made = export_onnx(model, list(adapters), progress=progress, **options)
    if as_json:
        click.echo(words.as_json(made))
    elif not quiet:
        click.echo(sentence(made))


def sentence(made: Any) -> str:
    """A line of what was made, and a line for each comparison."""
    kind = made.quantize or made.dtype
    merged = f" with {made.adapters} adapter{'s' * (made.adapters != 1)} merged" if made.adapters else ""
    what = f"{', '.join(made.files)} ({made.task}, {kind}, opset {made.opset}){merged}"
    what += f", {made.virtual} virtual tokens built in" if made.virtual else ""
    what += f", adapters beside it: {', '.join(made.swapped)}" if made.swapped else ""
    if not made.written:
        return f"would export {what} into {made.output}: at most {words.human(made.bytes)} of disk; nothing was written"
    lines = [f"exported {what} into {made.output} ({words.human(made.bytes)}, {made.seconds:.1f} s)"]
    lines += [_checked(made.checked) if made.checked else "not verified (--no-verify)"]
    lines += [_likeness(made.quantized, made.quantize)] if made.quantized else []
    for name, said in made.swapped.items():
        lines += [f"{name}: {_checked(SimpleNamespace(**said['verified']))}"] if "verified" in said else []
        lines += (
            [f"{name}: {_likeness(SimpleNamespace(**said['quantized']), made.quantize)}"] if "quantized" in said else []
        )
    return "\n".join(lines)


def _checked(found: Any) -> str:
    noise = "not measured" if found.noise is None else f"{found.noise:.1e}"
    greedy = f"; {found.greedy} of {found.of} greedy tokens equal" if found.of else ""
    ties = f" ({found.ties} ties)" if found.ties else ""
    return (
        f"verified on {found.provider} against torch: largest difference {max(found.prefill, found.decode):.1e} "
        f"(allowed {found.bound:.1e}, the model's own noise {noise}){greedy}{ties}"
    )


def _likeness(found: Any, kind: str) -> str:
    greedy = f", {found.greedy} of {found.of} greedy tokens equal" if found.of else ""
    return (
        f"{kind} against float: cosine {found.typical:.4f} (smallest {found.cosine:.4f}), largest difference {found.difference:.2g} "
        f"of {found.largest:.2g}{greedy}"
    )
