"""What a citation needs: one version everywhere, recorded beside scores; the locks' two sets."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_scores

from sinbad import __version__, score_files

ROOT = Path(__file__).parents[1]


def text_of(name: str) -> str:
    """Return the content of a file at the root."""
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_and_its_date_are_the_same_everywhere() -> None:
    citation = dict(re.findall(r"^([\w-]+): (.+)$", text_of("CITATION.cff"), re.MULTILINE))
    newest = re.search(r"^## (\S+) - (\d{4}-\d\d-\d\d)$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert (citation["version"], citation["date-released"]) == newest.groups()
    assert citation["version"] == __version__
    assert "version" not in text_of("pyproject.toml").replace("target-version", "")


def test_the_citation_is_complete() -> None:
    keys = re.findall(r"^([\w-]+):", text_of("CITATION.cff"), re.MULTILINE)
    required = {"cff-version", "message", "title", "abstract", "type", "version", "date-released"}
    required |= {"license", "authors", "keywords", "references", "preferred-citation"}
    assert sorted(keys) == sorted(required)
    assert "license: MIT\n" in text_of("CITATION.cff")
    assert text_of("LICENSE").startswith("MIT License")
    for arxiv in ("2302.12245", "2311.14773"):
        assert f"https://arxiv.org/abs/{arxiv}" in text_of("CITATION.cff")


def test_scores_record_the_version_and_are_consistent_without() -> None:
    info = score_files.environment_info(32, torch.device("cpu"))
    assert info["sinbad"] == __version__
    assert not any("sinbad" in names for names in score_files.EQUAL_IN.values())


def test_score_files_of_any_version_are_ensembled_and_finished(tmp_path: Path) -> None:
    files = toy_scores.make_files(tmp_path)
    versions: list[dict[str, str]] = [{}, {"sinbad": "0.9"}, {"sinbad": __version__}]
    for number, file in enumerate(files):
        record = file.record | {"made_with": versions[number % 3]}
        score_files.write_scores(replace(file, record=record))
        assert score_files.is_finished(file.path, file.recorded)
    scores = toy_scores.load(tmp_path)
    assert {str(file.record["made_with"]) for file in scores.files} == set(map(str, versions))


def packages(name: str) -> dict[str, str]:
    """Return package -> version of a lock."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text_of(name), re.MULTILINE))


def test_the_locks_differ_in_cuda_alone() -> None:
    cuda, cpu = (packages(f"requirements-lock-{build}.txt") for build in ("cuda", "cpu"))
    assert {name for name in cuda.keys() - cpu.keys() if not name.startswith("nvidia-")} == {
        "cuda-bindings",
        "cuda-pathfinder",
        "cuda-toolkit",
        "triton",
    }
    assert {name: version.removesuffix("+cpu") for name, version in cpu.items()} == {
        name: cuda[name] for name in cpu
    }
    assert {name for name, version in cpu.items() if version.endswith("+cpu")} == {
        "torch",
        "torchvision",
    }


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-demo.txt"])
def test_the_locks_hold_what_is_required(name: str) -> None:
    required = re.findall(r"^([\w-]+)>=", text_of(name), re.MULTILINE)
    assert required
    assert set(required) <= packages("requirements-lock-cpu.txt").keys()
