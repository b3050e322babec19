"""Every command of the README is understood by the script it names."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
OTHER_PROGRAMS = ("mkdir", "cd", "sh", "pip", "make")


def commands() -> list[str]:
    """Return the commands of all shell blocks of README.md."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    parts = (part.strip() for line in lines for part in line.split(" # ")[0].split(";"))
    return [part for part in parts if part]


def scripts() -> list[Path]:
    """Return what a person runs: the docstring is the help."""
    return [path for path in sorted(ROOT.glob("*.py")) if "run_script(main)" in path.read_text()]


def load(path: Path) -> ModuleType:
    """Import a script by its path; that runs nothing."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_commands_of_every_script() -> None:
    named = {words[1] for words in map(shlex.split, commands()) if words[0] == "python"}
    assert {path.name for path in scripts()} <= named


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_command_of_the_readme(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "python":
        load(ROOT / words[1]).parse_args(words[2:])
        return
    assert words[0] in OTHER_PROGRAMS
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_command_of_a_docstring(path: Path) -> None:
    module = load(path)
    lines = (module.__doc__ or "").replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split(";")]
    shown = [shlex.split(part) for part in parts if part.startswith(f"python {path.name}")]
    assert shown
    for words in shown:
        module.parse_args(words[2:])


def test_every_file_named_by_the_readme_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    names = set(re.findall(r"`([\w/]+\.(?:py|txt|sh))`", text)) | set(
        re.findall(r"\]\((imgs/[\w.]+)\)", text)
    )
    assert len(names) > 10
    missing = [name for name in names if not (ROOT / name).exists()]
    assert set(missing) <= {"batch_master.sh"}  # written by the generators
