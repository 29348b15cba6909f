"""The README's programs run, and print what it says they print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from tapegrad.ops import elementwise

README = (Path(__file__).parent.parent / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.splitlines()[-1][:40])
def test_program(program):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program, {"__name__": "readme"})
    promised = re.findall(r"print\(.*\n# (.*)", program)
    if promised:
        assert out.getvalue().splitlines() == promised


def test_the_row_of_an_operation_is_the_source():
    source = Path(elementwise.__file__).read_text().splitlines()
    (row,) = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    assert [line for line in row.splitlines() if line and line not in source] == []


def test_there_are_programs():
    assert len(PROGRAMS) >= 5


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)h][^)]*)\)", README))
def test_links_lead_somewhere(link):
    assert (Path(__file__).parent.parent / link).exists()
