"""The modules of the known image models: in the names of the training script, and in those of diffusers.

A name is a template, `#` stands for a layer's number. A module of the script may hold several of diffusers': `cut`
says how its rows are divided.

    ""         one module
    "equal"    rows in equal parts: q, k and v
    "linear1"  q, k and v as wide as the input, the rest is the MLP
    "swap"     one module, its two halves the other way round
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A module of the script, `theirs`, and what it is in diffusers."""

    theirs: str
    ours: tuple[str, ...]
    cut: str = ""


def _same(*templates: str) -> list[Place]:
    return [Place(t, (t,)) for t in templates]


ATTENTION = [
    "proj_in", "proj_out",
    *[f"transformer_blocks.#.{a}.{m}" for a in ("attn1", "attn2") for m in ("to_q", "to_k", "to_v", "to_out.0")],
    "transformer_blocks.#.ff.net.0.proj", "transformer_blocks.#.ff.net.2",
]  # fmt: skip
RESNET = {"in_layers.2": "conv1", "out_layers.3": "conv2", "emb_layers.1": "time_emb_proj",
          "skip_connection": "conv_shortcut"}  # fmt: skip
ENDS = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in", "out.2": "conv_out"}  # fmt: skip


def _unet() -> list[Place]:
    """SD 1 and SD 2, which the script names as diffusers does."""
    homes = ("down_blocks.#", "mid_block", "up_blocks.#")
    inside = [f"attentions.#.{m}" for m in ATTENTION] + [f"resnets.#.{m}" for m in RESNET.values()]
    steps = ["down_blocks.#.downsamplers.#.conv", "up_blocks.#.upsamplers.#.conv"]
    return _same(*[f"{h}.{m}" for h in homes for m in inside], *steps, *ENDS.values())


def _sgm() -> list[Place]:
    """SDXL in the names of the original: three layers to a block, numbered through."""
    places = [Place(a, (b,)) for a, b in ENDS.items()]
    middle = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    attentions = {"middle_block.1": "mid_block.attentions.0"}
    for i in range(9):
        block, layer = divmod(i, 3)
        for way, home in ((f"input_blocks.{i + 1}", "down_blocks"), (f"output_blocks.{i}", "up_blocks")):
            middle[f"{way}.0"] = f"{home}.{block}.resnets.{layer}"
            attentions[f"{way}.1"] = f"{home}.{block}.attentions.{layer}"
        if layer == 2:
            places.append(Place(f"input_blocks.{i + 1}.0.op", (f"down_blocks.{block}.downsamplers.0.conv",)))
            places += [Place(f"output_blocks.{i}.{j}.conv", (f"up_blocks.{block}.upsamplers.0.conv",)) for j in (2, 1)]
    places += [Place(f"{a}.{x}", (f"{b}.{y}",)) for a, b in middle.items() for x, y in RESNET.items()]
    return places + [Place(f"{a}.{m}", (f"{b}.{m}",)) for a, b in attentions.items() for m in ATTENTION]


def _flux() -> list[Place]:
    """FLUX in the names of the original; diffusers has q, k and v apart."""
    two, one = "transformer_blocks.#", "single_transformer_blocks.#"
    places = []
    for side, attn, out, ff, norm in (
        ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1"),
        ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context"),
    ):
        home = f"double_blocks.#.{side}"
        places += [
            Place(f"{home}_attn.qkv", tuple(f"{two}.attn.{m}" for m in attn), "equal"),
            Place(f"{home}_attn.proj", (f"{two}.attn.{out}",)),
            Place(f"{home}_mlp.0", (f"{two}.{ff}.net.0.proj",)),
            Place(f"{home}_mlp.2", (f"{two}.{ff}.net.2",)),
            Place(f"{home}_mod.lin", (f"{two}.{norm}.linear",)),
        ]
    parts = (*[f"{one}.attn.{m}" for m in ("to_q", "to_k", "to_v")], f"{one}.proj_mlp")
    embed = "time_text_embed"
    into = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
    return places + [
        Place("single_blocks.#.linear1", parts, "linear1"),
        Place("single_blocks.#.linear2", (f"{one}.proj_out",)),
        Place("single_blocks.#.modulation.lin", (f"{one}.norm.linear",)),
        Place("img_in", ("x_embedder",)),
        Place("txt_in", ("context_embedder",)),
        Place("final_layer.linear", ("proj_out",)),
        Place("final_layer.adaLN_modulation.1", ("norm_out.linear",), "swap"),
        *[Place(f"{a}.in_layer", (f"{embed}.{b}.linear_1",)) for a, b in into.items()],
        *[Place(f"{a}.out_layer", (f"{embed}.{b}.linear_2",)) for a, b in into.items()],
    ]


def _sd3() -> list[Place]:
    """SD 3 in the names of the original. The last block's context norm has another order of rows: see `names.last`."""
    places = []
    for side, attn, out, ff, norm in (
        ("x_block", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1"),
        ("context_block", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context"),
    ):
        home, block = f"joint_blocks.#.{side}", "transformer_blocks.#"
        places += [
            Place(f"{home}.attn.qkv", tuple(f"{block}.attn.{m}" for m in attn), "equal"),
            Place(f"{home}.attn.proj", (f"{block}.attn.{out}",)),
            Place(f"{home}.mlp.fc1", (f"{block}.{ff}.net.0.proj",)),
            Place(f"{home}.mlp.fc2", (f"{block}.{ff}.net.2",)),
            Place(f"{home}.adaLN_modulation.1", (f"{block}.{norm}.linear",)),
        ]
    return places


LAYER = "encoder.layers.#"
WITHIN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
CLIP = [
    *_same(*[f"text_model.{LAYER}.{m}" for m in WITHIN], "text_projection"),
    *[Place(f"{LAYER}.{m}", (f"text_model.{LAYER}.{m}",)) for m in WITHIN],  # as diffusers' own export has it
]
T5 = _same(
    *[f"encoder.block.#.layer.0.SelfAttention.{m}" for m in "qkvo"],
    *[f"encoder.block.#.layer.1.DenseReluDense.{m}" for m in ("wi", "wi_0", "wi_1", "wo")],
)
UNET = _unet()
FLUX = _flux()
SPACES = {  # how a script names the modules of a denoiser; the first that knows a name decides
    "diffusers": UNET,
    "sdxl": _sgm(),
    "flux": FLUX,
    "sd3": _sd3(),
    "flux-diffusers": _same(*[t for p in FLUX for t in p.ours]),
}
