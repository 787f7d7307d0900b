import pytest
from adaptkit_echo import Echo, Echoes

from adaptkit import Adapter, Site
from adaptkit.testing import check_format, check_tuner, zoo


def test_echo_keeps_the_promises_of_a_tuner():
    check_tuner(Echo())


def test_module_names_are_read_back(tmp_path):
    check_format(Echoes(), Adapter({"model.lin": Site(Echo(), {})}), tmp_path / "a.echo")


@pytest.mark.parametrize("kind", zoo())
def test_anything_else_is_shown_and_refused(kind, tmp_path, capsys):
    held = check_format(Echoes(), zoo()[kind], tmp_path / "a.echo", may_refuse=True)

    assert held == (kind == "empty")
    assert kind == "empty" or capsys.readouterr().err.startswith("echo: ")
