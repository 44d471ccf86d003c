"""Every protocol is found by name, has the interface that `eval.run` calls, is listed by the command line and is
described in the docs."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.config import Section
from common.errors import UserError
from eval.protocol_finder import needs, protocols
from tests.conftest import call

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", protocols())
def test_interface(name: str):
    module = importlib.import_module(f"eval.{name}")
    assert needs(name) == module.NEEDS and module.VERSION >= 1 and module.__doc__
    assert list(inspect.signature(module.run).parameters) == ["encoder", "gallery", "query", "cfg"]
    assert issubclass(module.Config, Section) and isinstance(module.Config(), Section)
    documented = "".join(page.read_text() for page in DOCS.glob("*.md"))
    assert re.search(rf"^\| `{name}` \|", documented, re.MULTILINE), f"docs/evaluation.md describes no {name}"


def test_names(capsys: pytest.CaptureFixture[str]):
    assert {"knn", "linear", "bits_per_byte"} <= protocols().keys() and "run" not in protocols()
    with pytest.raises(UserError, match="'knm': no such protocol; did you mean knn"):
        needs("knm")
    with pytest.raises(SystemExit):
        call("eval", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in protocols())


def test_names_are_known_without_torch():
    code = "import sys; from eval.protocol_finder import protocols; protocols(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
