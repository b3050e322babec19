"""Measuring the numbers of the pages: on tiny images, by the same functions."""

from pathlib import Path

import pytest
from conftest import draw_class

from benchmarks import make_results

@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return flags for a tiny category, whose network has random weights."""
    draw_class(tmp_path / "loco/juice_bottle", (50, 100))
    monkeypatch.setattr(make_results, "weights_of", lambda *_: "random")
    paths = {"--loco_dir": "loco", "--work": "work", "--out": "out"}
    return [word for flag, name in paths.items() for word in (flag, str(tmp_path / name))]


def test_the_ablation_has_a_row_for_each_repetition(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_results, "CHANGES", {"crop_size_ratio": ".99"})
    args = make_results.parse_args(["--only", "ablation", *words])
    head, *rows = make_results.measure_ablation(args)
    assert [row[:3] for row in rows] == [["crop_size_ratio", ".99", rep] for rep in range(5)]
    assert all(0 <= float(row[3]) <= 100 for row in rows)
    assert len(head) == len(rows[0])
