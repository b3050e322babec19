"""Tables and their provenance; published figures; files of an earlier report; null in JSON."""

import copy
import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy_scores

from sinbad import loco, report
from sinbad.report import metrics, tables

WHOLE = {"n_train": 372, "n_validation": 69, "n_good": 138, "n_anomalous": 91}


def report_in(tmp_path: Path) -> report.ReportOptions:
    """Return options of a report without figures."""
    return report.ReportOptions(tmp_path / "out", tmp_path / "none", None, None, False)


# ---------------------------------------------------------------- published figures


def test_published_figures_need_splits_of_locos_size() -> None:
    assert tables.is_whole("pushpins_loco", WHOLE)
    assert tables.is_whole("pushpins_struct", {**WHOLE, "n_anomalous": 81})
    for name, size in WHOLE.items():
        for other in (size - 1, None):  # None: no record
            assert not tables.is_whole("pushpins_loco", {**WHOLE, name: other})
    assert not tables.is_whole("cables_loco", WHOLE)
    connectors = {"n_good": 119, "n_anomalous": 108}
    for train, validation, whole in ((354, 59, 1), (360, 60, 1), (354, 60, 0), (360, 59, 0)):
        entry = {**connectors, "n_train": train, "n_validation": validation}
        assert tables.is_whole("splicing_connectors_loco", entry) == bool(whole)


def test_facts_of_loco_add_up_to_those_of_its_paper() -> None:
    facts = loco.LOCO_CLASSES.values()
    splits = "train", "validation", "good", "structural", "logical"
    totals = [sum(getattr(category, split) for category in facts) for split in splits]
    assert totals == [1772, 304, 575, 432, 561]
    for column in loco.PUBLISHED_LOCO.values():
        aurocs = [auroc for name, auroc in column.items() if name != "mean"]
        assert abs(np.mean(aurocs) - column["mean"]) <= 0.1  # of rounded figures


@pytest.fixture
def whole_loco(tmp_path: Path) -> metrics.Metrics:
    """Return metrics as if of all LOCO: ensembles 90 logical, 80 structural."""
    values = metrics.all_metrics(
        [toy_scores.load_toy(tmp_path, f"pushpins_{kind}") for kind in loco.KINDS], {}
    )
    first = values["data_sets"]["pushpins_loco"]
    values["data_sets"] = {}
    for category, facts in loco.LOCO_CLASSES.items():
        counts = {"loco": facts.logical, "struct": facts.structural}
        for kind, value in (("loco", 0.9), ("struct", 0.8)):
            entry = copy.deepcopy(first)
            entry["auroc"]["ensemble"], entry["auroc_interval_95"] = value, [0.71, 0.992]
            entry |= {"n_train": facts.train, "n_validation": facts.validation}
            entry |= {"n_good": facts.good, "n_anomalous": counts[kind]}
            values["data_sets"][f"{category}_{kind}"] = entry
    means = {"logical_anomalies": 0.9, "structural_anomalies": 0.8, "mean": 0.85}
    values["mean"]["auc_roc_by_column"]["ensemble"] = means
    return values


def test_each_paper_has_its_column(whole_loco: metrics.Metrics) -> None:
    rows = {row[0]: row[-4:] for row in tables.score_table([whole_loco])}
    papers = ["SINBAD (2302.12245)", "SINBAD Ens (2311.14773)"]
    assert rows["data set"] == ["ensemble", "95 % interval", *papers]
    assert rows["pushpins_loco"] == ["90.0", "71.0 to 99.2", "83.4", "-"]
    assert rows["screw_bag_struct"] == ["80.0", "71.0 to 99.2", "92.2", "-"]
    assert rows["mean logical"] == ["90.0", "-", "88.9", "-"]
    assert rows["mean structural"] == ["80.0", "-", "84.7", "-"]
    assert rows["mean"] == ["85.0", "-", "86.8", "88.3"]
    # Means of an incomplete LOCO have no published figure.
    whole_loco["data_sets"]["pushpins_loco"]["n_train"] = 371
    rows = {row[0]: row[-2:] for row in tables.score_table([whole_loco])}
    assert rows["pushpins_loco"] == rows["mean logical"] == rows["mean"] == ["-", "-"]
    assert rows["mean structural"] == ["84.7", "-"]


def test_several_runs_give_mean_and_deviation(whole_loco: metrics.Metrics) -> None:
    other = copy.deepcopy(whole_loco)
    other["data_sets"]["pushpins_loco"]["auroc"]["ensemble"] = 0.94
    row = next(row for row in tables.score_table([whole_loco, other]) if row[0] == "pushpins_loco")
    assert row[-4:-1] == ["92.0 +- 2.8", "71.0 to 99.2", "83.4"]


# ---------------------------------------------------------------- files of a report


def test_a_report_has_its_provenance(tmp_path: Path) -> None:
    runs = {}
    for seed in (0, 3):
        root = tmp_path / str(seed)
        toy_scores.write_subset(root, seed=seed)
        runs[f"seed {seed}"] = [toy_scores.load(root)]
    report.write_report(runs, report_in(tmp_path))
    out = tmp_path / "out"
    content = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    provenance = content["made_from"]
    assert list(content["runs"]) == provenance["report"]["runs"] == ["seed 0", "seed 3"]
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
    assert expected.items() <= provenance["level 14"].items()
    assert provenance["level 224"]["rep"] == [0, 1]
    assert provenance["pushpins_loco"]["n_images"] == [{"train": 9, "valid": 3, "test": 7}]
    assert provenance["made with"] == {"torch": ["2.10.0"], "device": ["cpu"]}
    text = (out / "table.md").read_text(encoding="utf-8")
    parts = "net resnet18", "weights_sha256 abc", "seed 0, 3", "torch 2.10.0", "rep 0, 1"
    assert [part for part in (*parts, "'train': 9") if part not in text] == []
    assert (out / "scores_seed_3.csv").exists()


def test_numbers_that_are_not_defined_are_null(tmp_path: Path) -> None:
    scores = toy_scores.load_toy(tmp_path)
    scores = replace(scores, labels=np.zeros(7), files=())
    report.write_report({"rep 0": [scores]}, report_in(tmp_path))
    content = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    entry = content["data_sets"]["pushpins_loco"]
    undefined = ("average_precision", "f1_max", "auroc_interval_95", "n_train", "n_validation")
    assert [entry[name] for name in undefined] == [None] * 5
    assert set(entry["auroc"].values()) == {None}


def test_tables_need_no_matplotlib(tmp_path: Path) -> None:
    toy_scores.write_subset(tmp_path)
    version = str(tmp_path / "ver1_pyramid_lvl_#")
    flags = ["--version", version, "--version_224", version, "--rep_num_224", "2", "--no-figures"]
    code = "import sys; sys.modules['matplotlib'] = None; import calc_anom_ensm as script; "
    code += "script.main(sys.argv[1:])"
    words = [*flags, "--out", str(tmp_path / "out"), "--maps_dir", str(tmp_path / "maps")]
    command = [sys.executable, "-c", code, *words]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    assert "| pushpins_loco |" in run.stdout


def test_files_of_an_earlier_report_are_removed_and_no_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stale = ["images_boxes_loco.png", "scores_rep_3.csv", "scores_seed_0.csv", "defects.csv"]
    kept = ["notes.md", "scores_mine.csv", "images_of_mine.png", "data.csv", "Table.md.bak"]
    out.mkdir()
    for name in [*stale, "roc_curves.png", *kept]:
        (out / name).write_text("old", encoding="utf-8")
    (out / "scores_rep_4.csv").mkdir()
    report.write_report({"rep 0": [toy_scores.load_toy(tmp_path)]}, report_in(tmp_path))
    written = ["classes.csv", "details.csv", "metrics.json", "scores.csv", "table.csv", "table.md"]
    assert {path.name for path in out.iterdir()} == {*kept, *written, "scores_rep_4.csv"}


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
    scores = replace(toy_scores.load_toy(tmp_path), image_paths=NAMES)
    report.write_report({"rep 0": [scores]}, report_in(tmp_path))
    with open(tmp_path / "out" / "scores.csv", newline="", encoding="utf-8") as file:
        image_paths = [row["image_path"] for row in csv.DictReader(file)]
    legible = [name.replace("\udcff", "\\udcff") for name in NAMES]
    assert image_paths == [f"pushpins/{name}" for name in legible]


def test_markdown_cells_and_csv() -> None:
    rows = [["data|set", "AUROC"], ["漢$字\n", "9"]]
    assert tables.markdown(rows).splitlines() == [
        "| data\\|set | AUROC |",
        "| --------- | ----: |",
        "| 漢$字\\n     |     9 |",
    ]
    assert list(csv.reader(io.StringIO(tables.csv_text(rows)))) == rows
    assert tables.cell("n\udcff") == "n\\udcff"
