"""The README's Python runs as written, in order, and its tables name what exists."""

import dataclasses
import pathlib
import re

import ncfast

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # one session, as a reader would type it
    assert isinstance(names["report"], ncfast.CollapseReport)


def test_every_field_is_in_the_tables_and_nothing_else():
    measured = README.split("## What is measured")[1].split("## Accuracy")[0]
    named = set(re.findall(r"`(\w+)`", measured))
    fields = {field.name for field in dataclasses.fields(ncfast.CollapseReport)}
    assert fields <= named
    functions = {"decision_radius"}
    assert {name for name in named - fields - functions if "_" in name} == set()
