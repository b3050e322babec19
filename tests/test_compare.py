"""Two runs on the same images: the paired bootstrap, its tables, images that are not the same."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy_scores

from sinbad import extra_scores, score_files
from sinbad.report import comparison

N_NORMAL, N_ANOMALOUS = 30, 20
PATHS = toy_scores.image_paths("pushpins_loco")
FEW = ("--rep_num_224", "2", "--pyramid_level", "7", "14")


def subset(
    tmp_path: Path, normal: np.ndarray, anomalous: np.ndarray, mvtype: str = "pushpins_loco"
) -> score_files.SubsetScores:
    """Return a data set with some scores, normal images first."""
    labels = np.repeat([0.0, 1.0], [len(normal), len(anomalous)])
    paths = [f"test/x/{i}.png" for i in range(len(labels))]
    final = np.concatenate([normal, anomalous])
    return replace(
        toy_scores.load_toy(tmp_path, mvtype), labels=labels, final=final, image_paths=paths
    )


def other_run(tmp_path: Path, *sets: score_files.SubsetScores) -> comparison.OtherRun:
    """Return these data sets as they are in another run's scores.csv, in another order."""
    path = tmp_path / "other.csv"
    lines = [
        f"{scores.mvtype},pushpins/{name},{int(label)},{value!r}\n"
        for scores in sets
        for name, label, value in zip(
            scores.image_paths, scores.labels, scores.final.tolist(), strict=True
        )
    ]
    path.write_text("data_set,image_path,label,score\n" + "".join(reversed(lines)))
    return comparison.OtherRun(path, extra_scores.read_score_rows(path))


def test_interval_against_a_loop(tmp_path: Path) -> None:
    """Of runs whose scores are alike: unpaired samples would give an interval thrice as wide."""
    rng = np.random.default_rng(1)
    common = rng.normal(0, 1, 50) + np.repeat([0, 1], [N_NORMAL, N_ANOMALOUS])
    ours, theirs = (np.round(common + rng.normal(0, 0.3, 50), 1) for _ in range(2))
    normal, anomalous = np.split(np.arange(50), [N_NORMAL])

    def auroc(scores: np.ndarray, normal: np.ndarray, anomalous: np.ndarray) -> float:
        pairs = scores[normal][:, None], scores[anomalous]
        return ((pairs[0] < pairs[1]) + (pairs[0] == pairs[1]) / 2).mean()

    differences = []
    for _ in range(3000):
        sample = rng.choice(normal, N_NORMAL), rng.choice(anomalous, N_ANOMALOUS)
        differences.append(auroc(ours, *sample) - auroc(theirs, *sample))
    expected = np.percentile(differences, [2.5, 97.5])
    sets = [subset(tmp_path, *np.split(scores, [N_NORMAL])) for scores in (ours, theirs)]
    values = comparison.compare_runs(sets[:1], other_run(tmp_path, sets[1]))
    entry = values["data_sets"]["pushpins_loco"]
    difference = auroc(ours, normal, anomalous) - auroc(theirs, normal, anomalous)
    assert entry["difference"] == pytest.approx(difference)
    np.testing.assert_allclose(entry["difference_interval_95"], expected, atol=0.006)
    assert values == comparison.compare_runs(sets[:1], other_run(tmp_path, sets[1]))
    assert values["mean"] == entry


def test_normal_images_of_a_category_are_sampled_once(tmp_path: Path) -> None:
    """The runs differ in the normal images alone, so no sample differs between the data sets."""
    normal, anomalous = np.arange(8.0), np.array([3.5, 4.5, 9.0])
    names = "pushpins_loco", "pushpins_struct"
    ours = [subset(tmp_path, normal, anomalous[:1].repeat(4), name) for name in names]
    theirs = [subset(tmp_path, normal + 4, anomalous[:1].repeat(4), name) for name in names]
    values = comparison.compare_runs(ours, other_run(tmp_path, *theirs))
    intervals = [values["data_sets"][name]["difference_interval_95"] for name in names]
    assert intervals[0][0] < intervals[0][1]
    assert intervals[0] == intervals[1] == values["mean"]["difference_interval_95"]


def test_mean_of_data_sets(tmp_path: Path) -> None:
    low, high = np.zeros(4), np.ones(4)
    names = "pushpins_loco", "pushpins_struct"
    ours = [subset(tmp_path, low, high, name) for name in names]
    theirs = [subset(tmp_path, high, low, names[0]), subset(tmp_path, low, high, names[1])]
    single = replace(ours[0], mvtype="pushpins_all", labels=np.zeros(8))
    other = other_run(tmp_path, *theirs, single)
    values = comparison.compare_runs([*ours, single], other)
    assert list(values["data_sets"]) == list(names)
    differences = [values["data_sets"][name]["difference"] for name in names]
    assert (differences, values["mean"]["difference"]) == ([1.0, 0.0], 0.5)
    assert values["mean"]["difference_interval_95"] == [0.5, 0.5]


def compare(tmp_path: Path, change: Callable[[str], str], *flags: str) -> Path:
    """Report toy scores and report them again, compared with a changed copy of the first."""
    toy_scores.write_subset(tmp_path)
    version, before = str(tmp_path / "ver1_pyramid_lvl_#"), tmp_path / "before"
    toy_scores.ensemble(version, before, *FEW)
    text = (before / "scores.csv").read_text()
    (tmp_path / "other.csv").write_text(change(text))
    toy_scores.ensemble(
        version, tmp_path / "out", *FEW, "--compare", str(tmp_path / "other.csv"), *flags
    )
    return tmp_path / "out"


def test_the_same_scores_do_not_differ(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = compare(tmp_path, str)
    (entry,) = json.loads((out / "metrics.json").read_text())["compare"]["data_sets"].values()
    assert (entry["difference"], entry["difference_interval_95"]) == (0.0, [0.0, 0.0])
    assert entry["auroc"] == entry["auroc_other"]
    assert "+0.0 to +0.0 |" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["ours", "another method's"])
def test_a_clear_difference_excludes_0(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The other run has its scores reversed; another method's file has other images too."""

    def change(text: str) -> str:
        rows = list(csv.reader(text.splitlines()[1:]))
        if form == "ours":
            lines = [f"{row[0]},{row[1]},{row[2]},-{row[3]}\n" for row in rows]
            return "data_set,image_path,label,score\n" + "".join(lines)
        lines = [f"/far/{row[1]},-{row[3]}\n" for row in rows]
        others = "pushpins/validation/good/000.png,7\nboxes/test/good/000.png,7\n"
        return "".join(lines) + others

    out = compare(tmp_path, change)
    header, row, mean = csv.reader((out / "compare.csv").read_text().splitlines())
    assert header == ["data set", "this run", "other run", "difference", "95 % interval"]
    assert row[1:] == mean[1:]
    low, high = map(float, row[4].split(" to "))
    assert 0 < low <= float(row[3]) <= high
    assert float(row[3]) == pytest.approx(float(row[1]) - float(row[2]), abs=0.11)
    printed, page = capsys.readouterr().out, (out / "table.md").read_text()
    for part in (row[4], f"minus {tmp_path / 'other.csv'}, in points"):
        assert part in printed
        assert part in page


FIRST, LAST = f"pushpins_loco,pushpins/{PATHS[0]}", f"pushpins/{PATHS[-1]}"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda text: re.sub(f"{FIRST}.*\n", "", text),
            rf"must hold every test image .* got no pushpins/{PATHS[0]} \(1 of 7 are missing\)",
        ),
        (
            lambda text: f"{text}{FIRST.replace('good/000', 'new/999')},0,1,1,1,1\n",
            r"line 9 must be of a test image of this run's pushpins_loco, got .*/new/999\.png",
        ),
        (
            lambda _: "".join(f"pushpins/{p},1\n" for p in (*PATHS, "test/good/77.png")),
            r"line 8 must be of a test image of this run's pushpins_loco, got .*/good/77\.png",
        ),
        (lambda text: text.replace(f"{FIRST},0", f"{FIRST},1"), "line 2 must have the label 0 of"),
        (lambda text: text + text.splitlines()[3] + "\n", "one score of .*002.png, got lines 4 an"),
        (lambda text: text.replace("pushpins_loco,", "pushpins_struct,"), "7 of 7 are missing"),
        (lambda text: text.replace(f"{LAST},1,", f"{LAST},1,x"), "line 8 must be .*plain decimal"),
    ],
)
def test_images_that_are_not_the_same(
    change: Callable[[str], str], match: str, tmp_path: Path
) -> None:
    with toy_scores.refused(f"{re.escape(str(tmp_path / 'other.csv'))}.*{match}"):
        compare(tmp_path, change)
    assert not list(tmp_path.glob("out/*"))


def test_a_file_that_the_report_replaces_is_refused(tmp_path: Path) -> None:
    out = compare(tmp_path, str)
    before = (out / "scores.csv").read_bytes()
    with toy_scores.refused("compare must be a file that this report does not replace"):
        compare(tmp_path, str, "--compare", str(out / "scores.csv"))
    assert (out / "scores.csv").read_bytes() == before
