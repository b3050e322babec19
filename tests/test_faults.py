"""Inputs that once lost or spoiled a result."""

from pathlib import Path

import pytest

import sinbad_detector
from sinbad import errors


def test_heatmaps_lie_among_no_other_images(tmp_path: Path) -> None:
    images, maps = tmp_path / "new", tmp_path / "maps"
    images.mkdir()
    (images / "a.png").touch()
    flags = ["score", "--detector", str(tmp_path / "d.npz"), str(images / "a.png"), "--heatmaps"]
    with pytest.raises(errors.UserError, match="outside"):
        sinbad_detector.main([*flags, str(images)])
    maps.mkdir()
    (maps / "0002_b.png.png").touch()
    with pytest.raises(errors.UserError, match="0002_b"):
        sinbad_detector.main([*flags, str(maps)])


def test_an_image_of_a_scored_folder_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    flags = ["score", "--detector", str(tmp_path / "d.npz"), str(tmp_path)]
    with pytest.raises(errors.UserError, match="is an input"):
        sinbad_detector.main([*flags, "--out", str(tmp_path / "a.png")])
