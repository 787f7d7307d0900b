"""The table of what formats cannot hold, in docs/formats.md, is what `adaptkit plugins --json` says."""

from __future__ import annotations

import json
import re

import pytest
from places import ROOT

from adaptkit.cli.app import run

DOC = ROOT / "docs" / "formats.md"
HEAD = "| format | can | cannot hold |\n|---|---|---|\n"


def lines(text: str) -> list[str]:
    """The table's lines, of the formats that are shipped here, from what the command prints."""
    formats = [p for p in json.loads(text) if p["kind"] == "format" and p["package"] == "adaptkit"]
    return [f"| `{p['name']}` | {', '.join(p['can'])} | {'; '.join(p['cannot'])} |" for p in formats]


def test_the_documents_table_is_what_plugins_say(capsys: pytest.CaptureFixture[str]):
    """Run `python tests/test_docs_table.py` to write it again."""
    assert run(["plugins", "--json"]) == 0
    made = lines(capsys.readouterr().out)
    assert len(made) >= 6
    assert DOC.read_text().partition(HEAD)[2].partition("\n\n")[0].splitlines() == made


if __name__ == "__main__":
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(["plugins", "--json"])
    table = HEAD + "\n".join(lines(said.getvalue())) + "\n\n"
    DOC.write_text(re.sub(re.escape(HEAD) + r"(?:\|.*\n)*\n", lambda _: table, DOC.read_text()))
