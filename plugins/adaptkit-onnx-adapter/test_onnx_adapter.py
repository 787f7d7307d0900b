import numpy as np
import pytest

from adaptkit import Adapter, AdaptKitError, LoRA, Site
from adaptkit.testing import check_format, zoo

ort = pytest.importorskip("onnxruntime")
from adaptkit_onnx_adapter import OnnxAdapter  # noqa: E402


def lora(r=2, alpha=3.0):
    rng = np.random.default_rng(r)
    params = {"A": rng.standard_normal((r, 4)).astype("f4"), "B": rng.standard_normal((6, r)).astype("f4")}
    return Site(LoRA(r=r, alpha=alpha), params)


@pytest.mark.parametrize("kind", zoo())
def test_every_kind_is_held_or_refused(kind, tmp_path):
    held = check_format(OnnxAdapter(), zoo()[kind], tmp_path / "a.onnx_adapter", may_refuse=True, may_fold=True)

    assert held == (kind in {"lora", "two ranks", "rslora", "embedding", "half", "bfloat16", "meta"})


def test_onnx_runtime_loads_the_file(tmp_path):
    OnnxAdapter().write(Adapter({"layers.0.q": lora()}), tmp_path / "a.onnx_adapter")
    loaded = ort.LoraAdapter()
    loaded.Load(str(tmp_path / "a.onnx_adapter"))

    found = ort.AdapterFormat.read_adapter(str(tmp_path / "a.onnx_adapter")).get_parameters()
    site = lora()
    assert np.array_equal(found["layers.0.q.lora_A.weight"].numpy(), site.params["A"].T)
    assert np.array_equal(found["layers.0.q.lora_B.weight"].numpy(), site.params["B"].T * np.float32(1.5))


def model(folder, **inputs):
    """A graph that adds up its inputs: a path, and what it takes by name, as (shape, type)."""
    onnx = pytest.importorskip("onnx")
    given = [onnx.helper.make_tensor_value_info(n, getattr(onnx.TensorProto, k), s) for n, (s, k) in inputs.items()]
    nodes = [onnx.helper.make_node("Shape", [n], [f"size of {n}"]) for n in inputs]
    out = [onnx.helper.make_tensor_value_info(f"size of {n}", onnx.TensorProto.INT64, [2]) for n in inputs]
    made = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", given, out), opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(made, folder / "model.onnx")
    return folder


def test_a_models_own_names_are_used(tmp_path):
    prefix = "base_model.model."
    base = model(
        tmp_path,
        **{f"{prefix}q.lora_A.weight": ([4, "r"], "FLOAT"), f"{prefix}q.lora_B.weight": (["r", 6], "FLOAT")},
    )
    for i, place in enumerate((base, base / "model.onnx")):
        OnnxAdapter().write(Adapter({"q": lora()}), tmp_path / f"{i}.onnx_adapter", base=place)
        found = ort.AdapterFormat.read_adapter(str(tmp_path / f"{i}.onnx_adapter")).get_parameters()
        assert set(found) == {f"{prefix}q.lora_A.weight", f"{prefix}q.lora_B.weight"}


@pytest.mark.parametrize(("name", "shape", "kind", "why"), [
    ("q.lora_B.weight", ["r", 7], "FLOAT", "takes"),
    ("q.lora_B.weight", ["r", 6], "FLOAT16", "--dtype float16"),
    ("p.lora_B.weight", ["r", 6], "FLOAT", "no input for q.lora_B.weight"),
    ("q.lora_B.default.weight", ["r", 6], "FLOAT", "scale of its own"),
])  # fmt: skip
def test_what_the_model_cannot_take_is_refused(tmp_path, name, shape, kind, why):
    base = model(tmp_path, **{"q.lora_A.weight": ([4, "r"], "FLOAT"), name: (shape, kind)})
    with pytest.raises(AdaptKitError, match=why):
        OnnxAdapter().write(Adapter({"q": lora()}), tmp_path / "a.onnx_adapter", base=base)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_folder_without_a_model_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(AdaptKitError, match=r"holds no \.onnx file"):
        OnnxAdapter().write(Adapter({"q": lora()}), tmp_path / "a.onnx_adapter", base=tmp_path / "base")


def test_a_base_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(AdaptKitError, match="m.onnx: cannot be opened"):
        OnnxAdapter().write(Adapter({"q": lora()}), tmp_path / "a.onnx_adapter", base=tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_cut_file_is_a_sentence(tmp_path):
    whole = tmp_path / "a.onnx_adapter"
    OnnxAdapter().write(Adapter({"q": lora()}), whole)
    data = whole.read_bytes()
    for size in range(0, len(data) - 64, 37):
        whole.write_bytes(data[:size])
        with pytest.raises(AdaptKitError, match="a.onnx_adapter: "):
            OnnxAdapter().read(whole)


def test_numbers_that_are_none_are_refused(tmp_path):
    site = lora()
    site.params["A"][0, 0] = np.inf
    with pytest.raises(AdaptKitError, match="finite"):
        OnnxAdapter().write(Adapter({"q": site}), tmp_path / "a.onnx_adapter")
    assert not list(tmp_path.iterdir())
