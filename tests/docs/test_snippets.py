"""Every snippet of the documents runs: Python blocks as they stand, vqfast commands as far as their arguments."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS += sorted((ROOT / "kernels").glob("*/README.md"))


def blocks(language: str) -> list:
    found = []
    for path in DOCUMENTS:
        for i, code in enumerate(re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)):
            found.append(pytest.param(code, id=f"{path.relative_to(ROOT)}-{i}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_snippet_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), {})


@pytest.mark.parametrize("script", blocks("bash"))
def test_commands_exist_and_take_these_arguments(script, tmp_path, monkeypatch, capsys):
    """Run against data that is missing: a command that parses gets as far as saying so."""
    from vqfast.cli import main

    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in script.replace("\\\n", " ").splitlines() if line.startswith("vqfast ")]
    assert commands
    for command in commands:
        code = main(command[1:])
        error = capsys.readouterr().err
        assert code == 2 and re.search(r"vqfast: .*(photos|runs/)", error), error
        assert list(tmp_path.iterdir()) == []


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"
