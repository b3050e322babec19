"""Tables and what they were made from; published figures; what an earlier report left."""

import copy
import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from toy_scores import load_toy, options_of, write_data_set

import sinbad.report.tables as tables
from sinbad import ensembles, loco, report
from sinbad.report import metrics

WHOLE = {"n_train": 372, "n_validation": 69, "n_good": 138, "n_anomalous": 91}


def report_in(tmp_path: Path) -> report.ReportOptions:
    """Return options of a report without pictures."""
    return report.ReportOptions(tmp_path / "out", tmp_path / "none", None, None, False)


# ---------------------------------------------------------------- published figures


def test_published_figures_need_all_splits_of_locos_size() -> None:
    assert tables.is_whole("pushpins_loco", WHOLE)
    assert tables.is_whole("pushpins_struct", {**WHOLE, "n_anomalous": 81})
    for name in WHOLE:
        assert not tables.is_whole("pushpins_loco", {**WHOLE, name: WHOLE[name] - 1})
        assert not tables.is_whole("pushpins_loco", {**WHOLE, name: None})  # no record
    assert not tables.is_whole("cables_loco", WHOLE)
    connectors = {"n_good": 119, "n_anomalous": 108}
    for train, validation, whole in ((354, 59, 1), (360, 60, 1), (354, 60, 0), (360, 59, 0)):
        entry = {**connectors, "n_train": train, "n_validation": validation}
        assert tables.is_whole("splicing_connectors_loco", entry) == bool(whole)


@pytest.fixture
def whole_loco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> metrics.Metrics:
    """Return metrics as if of all LOCO: ensembles 90 logical, 80 structural."""
    values = metrics.all_metrics(
        [load_toy(tmp_path, f"pushpins_{k}") for k in ("loco", "struct")], {}
    )
    entry = values["data_sets"]["pushpins_loco"]
    by_kind = {"loco": 0.9, "struct": 0.8}
    values["data_sets"] = {}
    for class_name, facts in loco.LOCO_CLASSES.items():
        for kind, value in by_kind.items():
            own = copy.deepcopy(entry)
            own["auroc"]["ensemble"], own["auroc_interval_95"] = value, [0.71, 0.992]
            own |= {"n_train": facts.train, "n_validation": facts.validation}
            own["n_good"] = facts.good
            own["n_anomalous"] = facts.logical if kind == "loco" else facts.structural
            values["data_sets"][f"{class_name}_{kind}"] = own
    means = {"logical_anomalies": 0.9, "structural_anomalies": 0.8, "mean": 0.85}
    values["mean"]["auc_roc_by_column"]["ensemble"] = means
    return values


def test_the_difference_is_ours_minus_the_published(whole_loco: metrics.Metrics) -> None:
    rows = {row[0]: row[-3:] for row in tables.score_table([whole_loco])}
    assert rows["data set"] == ["95 % interval", "published", "difference"]
    assert rows["pushpins_loco"] == ["71.0 to 99.2", "83.4", "+6.6"]
    assert rows["breakfast_box_loco"] == ["71.0 to 99.2", "96.5", "-6.5"]
    assert rows["screw_bag_struct"] == ["71.0 to 99.2", "92.2", "-12.2"]
    assert rows["mean logical"] == ["-", "88.9", "+1.1"]
    assert rows["mean structural"] == ["-", "84.7", "-4.7"]
    assert rows["mean"] == ["-", "88.3", "-3.3"]


def test_means_of_an_incomplete_loco_have_no_published_figure(whole_loco: metrics.Metrics) -> None:
    whole_loco["data_sets"]["pushpins_loco"]["n_train"] = 371
    rows = {row[0]: row[-2:] for row in tables.score_table([whole_loco])}
    assert rows["pushpins_loco"] == rows["mean logical"] == rows["mean"] == ["-", "-"]
    assert rows["mean structural"] == ["84.7", "-4.7"]


def test_several_runs_give_mean_and_deviation(whole_loco: metrics.Metrics) -> None:
    other = copy.deepcopy(whole_loco)
    other["data_sets"]["pushpins_loco"]["auroc"]["ensemble"] = 0.94
    row = next(row for row in tables.score_table([whole_loco, other]) if row[0] == "pushpins_loco")
    assert row[-4:] == ["92.0 +- 2.8", "71.0 to 99.2", "83.4", "+8.6"]


# ---------------------------------------------------------------- what it was made from


def test_a_report_tells_what_it_was_made_from(tmp_path: Path) -> None:
    runs = {}
    for seed in (0, 3):
        root = tmp_path / str(seed)
        write_data_set(root, "pushpins_loco", edit=lambda s, k=seed: s.update(seed=k))
        runs[f"seed {seed}"] = [ensembles.load_data_set(options_of(root), "pushpins_loco")]
    report.write_report(runs, report_in(tmp_path))
    out = tmp_path / "out"
    found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    made = found["made_from"]
    assert list(found["runs"]) == ["seed 0", "seed 3"]
    assert made["report"]["runs"] == ["seed 0", "seed 3"]
    expected = {
        "net": ["resnet18"],
        "weights_sha256": ["abc"],
        "precision": ["fp32"],
        "seed": [0, 3],
        "official": [False],
        "n_crops": [9, 1],
        "crop_size_ratio": [0.5, 0.99],
        "rep": [0],
        "n_projections": [10],
    }
    assert expected.items() <= made["level 14"].items()
    assert made["level 224"]["rep"] == [0, 1]
    assert made["pushpins_loco"]["n_images"] == [{"train": 9, "valid": 3, "test": 7}]
    assert made["made with"] == {"torch": ["2.10.0"], "device": ["cpu"]}
    text = (out / "table.md").read_text(encoding="utf-8")
    for part in (
        "net resnet18",
        "weights_sha256 abc",
        "seed 0, 3",
        "official False",
        "rep 0, 1",
        "'train': 9",
        "torch 2.10.0",
        "n_crops 9, 1",
    ):
        assert part in text
    assert (out / "scores_seed_3.csv").exists()


def test_what_another_report_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stale = [
        "images_boxes_loco.png",
        "scores_rep_3.csv",
        "scores_seed_0.csv",
        "defects.csv",
        "roc_curves.png",
    ]
    kept = ["notes.md", "scores_mine.csv", "images_of_mine.png", "data.csv", "Table.md.bak"]
    out.mkdir()
    for name in [*stale, *kept]:
        (out / name).write_text("old", encoding="utf-8")
    (out / "scores_rep_4.csv").mkdir()
    report.write_report({"rep 0": [load_toy(tmp_path, "pushpins_loco")]}, report_in(tmp_path))
    written = ["classes.csv", "details.csv", "metrics.json", "scores.csv", "table.csv", "table.md"]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*kept, *written, "scores_rep_4.csv"]
    )


# ---------------------------------------------------------------- text


NAMES = [
    "test/good/a$1_$2.png",
    "test/good/a|b.png",
    "test/good/漢字.png",
    "test/good/n\udcff.png",
    "test/x/two\nlines.png",
    'test/x/,".png',
    "test/x/0.png",
]


def test_names_of_all_kinds_are_written(tmp_path: Path) -> None:
    scores = replace(load_toy(tmp_path, "pushpins_loco"), image_paths=NAMES)
    report.write_report({"rep 0": [scores]}, report_in(tmp_path))
    with open(tmp_path / "out" / "scores.csv", newline="", encoding="utf-8") as file:
        found = [row["image_path"] for row in csv.DictReader(file)]
    legible = [name.replace("\udcff", "\\udcff") for name in NAMES]
    assert found == [f"pushpins/{name}" for name in legible]


def test_markdown_cells_and_csv() -> None:
    rows = [["data|set", "AUROC"], ["漢$字\n", "9"]]
    assert tables.markdown(rows).splitlines() == [
        "| data\\|set | AUROC |",
        "| --------- | ----: |",
        "| 漢$字\\n     |     9 |",
    ]
    assert list(csv.reader(io.StringIO(tables.csv_text(rows)))) == rows
    assert tables.cell("n\udcff") == "n\\udcff"
