"""What an export holds in memory beside the numbers themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="pip install adaptkit[onnx]")

HEAD = """
<ir_version: 10, opset_import: ["" : 20]>
head (float[N, 2048] x) => (float[N, 8192] y)
<float[8192, 2048] table>
{
    turned = Transpose <perm = [1, 0]> (table)
    y = MatMul(x, turned)
}
"""
TABLE = 8192 * 2048 * 4


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_checking_a_tied_embedding_needs_no_second_copy_of_it(tmp_path: Path):
    """ONNX Runtime would turn the table around when it loads the graph, and hold both."""
    import onnx_ir

    from adaptkit.export.players import Session
    from adaptkit.export.write import save

    table = np.random.default_rng(0).standard_normal((8192, 2048), "f4")
    model = onnx_ir.from_onnx_text(HEAD, initializers=[onnx_ir.tensor(table, name="table")])
    save(model, tmp_path / "head.onnx")
    before = anonymous()
    session = Session(tmp_path / "head.onnx")
    x = np.ones((3, 2048), "f4")
    assert np.allclose(session.run({"x": x})["y"], x @ table.T, atol=1e-3)
    assert anonymous() - before < TABLE / 2


def test_tracing_gives_torch_its_settings_back():
    """Also when it fails."""
    import torch._dynamo.config
    import torch.fx.config

    from adaptkit.export.trace import light

    def settings() -> tuple[bool, bool]:
        return torch.fx.config.do_not_emit_stack_traces, torch._dynamo.config.fake_tensor_cache_enabled

    before = settings()
    with pytest.raises(ValueError, match="fails"), light():
        assert settings() == (True, False) != before
        raise ValueError("it fails")
    assert settings() == before
