"""Another method's scores: read from CSV, normalised, weighted, added; their order stays."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import conftest
import numpy as np
import pytest
import toy_scores
from numpy.typing import NDArray

from sinbad import extra_scores

VALID, TEST = [1.0, 2.0, 4.5], [1.0, 2.0, 3.0, 4.0, 9.0, 8.0, 7.0]
TEST_PATHS = toy_scores.image_paths("pushpins_loco")
VALID_PATHS = [f"validation/good/{i:03d}.png" for i in range(3)]
CASES = conftest.SHARED / "cases"


def write_csv(
    path: Path,
    valid: Iterable[float] = VALID,
    test: Iterable[float] = TEST,
    paths: Iterable[str] = (*VALID_PATHS, *TEST_PATHS),
    before: str = "/else/where/",
) -> Path:
    """Write scores of another method for images of pushpins, below some folder."""
    rows = zip(paths, (*valid, *test), strict=True)
    path.write_text("".join(f"{before}pushpins/{name},{value}\n" for name, value in rows))
    return path


def normalise(
    path: Path, norm: str = "mean", category: str = "pushpins", paths: Iterable[str] = TEST_PATHS
) -> NDArray[np.float64]:
    """Read a CSV file and return the normalised scores of test images."""
    extra = extra_scores.read_extra_scores(path, 1.0, norm)
    return extra_scores.normalise(extra, category, list(paths))


@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("lowest", [-1.0, 0.0, 0.001, 1.0])
def test_scores_are_normalised_and_never_reversed(
    lowest: float, scale: float, tmp_path: Path
) -> None:
    valid, test = (np.array([lowest, *(scale * np.array(a[1:]))]) for a in (VALID, TEST))
    path = write_csv(tmp_path / "other.csv", valid, test)
    np.testing.assert_allclose(
        normalise(path, "std"), (test - valid.mean()) / valid.std(), rtol=1e-12
    )
    if lowest < 0:
        with toy_scores.refused("got a lowest of -1 and a mean of .*; pass --extra_norm std"):
            normalise(path)
    else:
        expected = test / (valid.mean() + 1e-5) + 1e-5
        np.testing.assert_allclose(normalise(path), expected, rtol=1e-12)


def test_scores_that_cannot_be_normalised(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    for valid in ([0.0] * 3, [-1.0] * 3, [-2.0, 0.5, 0.5]):
        write_csv(path, valid)
        with toy_scores.refused("pass --extra_norm std"):
            normalise(path)
        if len(set(valid)) == 1:
            with toy_scores.refused("must vary over the validation images .* 3 equal ones"):
                normalise(path, "std")


def test_negative_scores_at_a_great_weight_through_the_script(tmp_path: Path) -> None:
    toy_scores.write_subset(tmp_path)
    test = [-10.2, -10.3, -10.4, -10.5, -5.0, -4.9, -4.8]
    path = write_csv(tmp_path / "other.csv", [-10.0, -10.1, -10.4], test)
    version = str(tmp_path / "ver1_pyramid_lvl_#")
    flags = ["--rep_num_224", "2", "--extra_scores", str(path), "--extra_weight", "1000"]
    with toy_scores.refused("--extra_norm std"):
        toy_scores.ensemble(version, tmp_path / "out", *flags)
    rows = toy_scores.ensemble(version, tmp_path / "out", *flags, "--extra_norm", "std")
    final = toy_scores.load(tmp_path).ensemble.final + 1000 * normalise(path, "std")
    np.testing.assert_allclose([float(row["score"]) for row in rows], final, rtol=1e-12)
    values = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert values["data_sets"]["pushpins_loco"]["auroc"]["ensemble + other"] == 1.0
    assert values["made_from"]["extra scores"]["norm"] == ["std"]


@pytest.mark.parametrize("folder", ["validation", "valid/good", "val"])
@pytest.mark.parametrize("before", ["", "/else/where/", "pushpins/"])
def test_scores_of_other_layouts(before: str, folder: str, tmp_path: Path) -> None:
    """Paths of VisA's depth and of validation images without a folder of their own."""
    test_paths = [f"Data/Images/{'Normal' if i < 4 else 'Anomaly'}/{i:04d}.JPG" for i in range(7)]
    path = tmp_path / "other.csv"
    others = f"{before}cable/{folder}/0.png,77\nother/Data/Images/Normal/0000.JPG,88\n"
    write_csv(path, [], TEST, test_paths, before)
    path.write_text(path.read_text() + others)
    with toy_scores.refused("got none of pushpins/validation/.* without that folder takes none"):
        normalise(path, paths=test_paths)
    valid_paths = [f"{folder}/{i}.png" for i in range(3)]
    write_csv(path, VALID, TEST, [*valid_paths, *test_paths], before)
    path.write_text(path.read_text() + others)
    expected = np.array(TEST) / (2.5 + 1e-5) + 1e-5
    np.testing.assert_allclose(normalise(path, paths=test_paths), expected, rtol=1e-12)


def test_a_file_with_a_header_as_our_own(tmp_path: Path) -> None:
    plain = normalise(write_csv(tmp_path / "plain.csv"))
    rows = [line.split(",") for line in (tmp_path / "plain.csv").read_text().splitlines()]
    text = "score,label,image_path\n\n" + "".join(f"{v},0,{name}\n" for name, v in rows)
    (tmp_path / "ours.csv").write_text(text, encoding="utf-8-sig")
    np.testing.assert_array_equal(normalise(tmp_path / "ours.csv"), plain)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "must hold lines"),
        ("a/b.png,high\n", "line 1 must be"),
        ("9.png,1\n", "line 1 must be"),
        ("a/b.png,1\na/c.png,3,69\n", "line 2 must be .* got a/c.png,3,69"),
        ('a/b.png,1\na/c.png,"3,69"\n', "line 2 must be"),
        ('a/b.png,1\n\na/c.png,"3,690.0"\n', "line 3 must be"),
        ("a/b.png,1_000\n", "line 1 must be .* got a/b.png,1_000"),
        ("a/b.png,1e999\n", "line 1 must be"),
        ("a/b.png,0x10\n", "line 1 must be"),
        ("score,image_path\n1,a/b.png\nnan,a/c.png\n", "line 3 must be"),
        ("a/b.png\xff,1\n", "must be CSV in UTF-8"),
    ],
)
def test_bad_files(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_bytes(text.encode("latin-1"))
    with toy_scores.refused(f"{re.escape(str(path))} {match}"):
        extra_scores.read_extra_scores(path, 1.0, "mean")


@pytest.mark.parametrize("twice", [VALID_PATHS[1], TEST_PATHS[5]])
def test_an_image_with_two_scores(twice: str, tmp_path: Path) -> None:
    """As where the scores of two models lie in one file."""
    path = write_csv(tmp_path / "other.csv")
    first = 1 + [*VALID_PATHS, *TEST_PATHS].index(twice)
    path.write_text(path.read_text() + f"elsewhere/pushpins/{twice},5\n")
    match = f"other.csv must hold one score of pushpins/{twice}, got lines {first} and 11"
    with toy_scores.refused(match):
        normalise(path)


def test_missing_test_images(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "other.csv", VALID, TEST[1:], [*VALID_PATHS, *TEST_PATHS[1:]])
    with toy_scores.refused(r"no pushpins/test/good/000.png \(1 of 7 are missing\)"):
        normalise(path)


@pytest.mark.skipif(not CASES.is_dir(), reason="needs the small inputs beside this checkout")
def test_files_from_practice() -> None:
    paths = [f"test/{kind}/{i:03d}.png" for kind in ("good", "bad") for i in range(6)]
    scores = normalise(CASES / "extra_scores_plain.csv", "std", "obj", paths)
    assert scores[6:].min() > scores[:6].max()
    for name, match in (
        ("twice", "twice.csv must hold one score of obj/validation/000.png, got lines 2 and 20"),
        ("decimal_comma", "comma.csv line 2 must be .* got obj/validation/000.png,3,69"),
    ):
        with toy_scores.refused(match):
            normalise(CASES / f"extra_scores_{name}.csv", "mean", "obj", paths)
