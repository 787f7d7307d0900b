import numpy as np
import pytest
from adaptkit_npz import Npz

from adaptkit import AdaptKitError
from adaptkit.testing import check_format, zoo


@pytest.mark.parametrize("kind", zoo())
def test_every_kind_is_held_or_refused(kind, tmp_path):
    held = check_format(Npz(), zoo()[kind], tmp_path / "a.npz", may_refuse=True)

    assert held == (kind != "bfloat16")


def test_numpy_opens_the_file(tmp_path):
    adapter = zoo()["lora"]
    Npz().write(adapter, tmp_path / "a.npz")

    with np.load(tmp_path / "a.npz") as f:
        (module,) = adapter.sites
        assert np.array_equal(f[f"sites/{module}/A"], adapter.sites[module].params["A"])


def test_another_programs_npz_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))

    with pytest.raises(AdaptKitError, match=r"a\.npz: is no adapter"):
        Npz().read(tmp_path / "a.npz")
