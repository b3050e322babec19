"""Files of the UEA archive: values, missing values, units, errors that name file and line."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from uea_toy import FIRST_LINE, make_series, run, ts_text, write_toy

from sinbad import errors, uea

ROOT = Path(__file__).parents[1]


def load(folder: Path, *options: tuple[int, int]) -> uea.TimeSeriesDataset:
    return uea.load_time_series(uea.find_files(folder, "Toy"), *options)


def change(path: Path, pattern: str, new: str, line: int | None = None) -> None:
    """Replace the first match of a pattern in a file, or in one line of it."""
    lines = path.read_text(encoding="utf-8").split("\n")
    parts = lines if line else ["\n".join(lines)]
    index = (line or 1) - 1
    parts[index], n_changes = re.subn(pattern, new, parts[index], count=1)
    assert n_changes == 1
    path.write_text("\n".join(parts), encoding="utf-8")


# ---------------------------------------------------------------- files


def test_values_and_labels_are_those_written(tmp_path: Path) -> None:
    values, labels = uea.read_split(write_toy(tmp_path, missing=True) / "Toy/Toy_TRAIN.ts")
    written = make_series(1, 6, (20, 20))
    written[0][0][1, 3:5] = np.nan
    np.testing.assert_allclose(values, [series for series, _ in written], atol=5.1e-7)
    assert labels == [label for _, label in written]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("\n", "\r\n"),
        ("\n", "\r"),
        ("# synthetic", "\ufeff# \udcff"),  # a byte order mark, a byte that is not UTF-8
        (",?,", ",\u2028?\x0c,"),
        (",?,", ",\tNaN ,"),
        ("@data\n", "@DATA\n\n# a comment\n"),
    ],
)
def test_other_ways_to_write_a_file_are_read(tmp_path: Path, old: str, new: str) -> None:
    path = write_toy(tmp_path, missing=True) / "Toy/Toy_TRAIN.ts"
    plain, _ = uea.read_split(path)
    assert old in path.read_text()
    path.write_bytes(path.read_text().replace(old, new).encode("utf-8", "surrogateescape"))
    np.testing.assert_array_equal(uea.read_split(path)[0], plain)


@pytest.mark.parametrize("field", ["5", "+5.", "5e0", "0.5E+1", " 5 ", "5E-0", ".5e1"])
def test_decimal_numbers_are_read(tmp_path: Path, field: str) -> None:
    path = write_toy(tmp_path) / "Toy/Toy_TRAIN.ts"
    change(path, "^[^,]*", field, line=FIRST_LINE)
    assert uea.read_split(path)[0][0][0, 0] == 5


def test_only_series_of_the_lengths_asked_for_are_kept(tmp_path: Path) -> None:
    folder = write_toy(tmp_path, (15, 60))
    values, _ = uea.read_split(folder / "Toy/Toy_TRAIN.ts")
    lengths = [series.shape[1] for series in values]
    assert min(lengths) < 20 and max(lengths) > 50
    data = load(folder, (20, 50))
    assert len(data.train) == len(data.train_labels) == sum(20 <= n <= 50 for n in lengths)
    assert data.train.shape[2] <= 50
    with pytest.raises(
        errors.UserError, match=r"TRAIN.ts, .* followed by series of 70 to 80 steps"
    ):
        load(folder, (70, 80))


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "data")
    for path in (folder / "Toy").glob("*.ts"):
        path.write_text(path.read_text().replace("up", "größer"), encoding="utf-8")
    locale = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "sinbad_time_series.py", "--dataset_dir", folder, "--dataset", "Toy"]
    command += ["--out", tmp_path, "--n_projections", "7"]
    result = subprocess.run(command, cwd=ROOT, env=locale, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "größer" in result.stdout.decode("utf-8")
    assert "größer" in (tmp_path / "Toy.csv").read_text(encoding="utf-8")


# ---------------------------------------------------------------- units


def test_missing_values_and_padding_are_zero_in_units_of_the_file(tmp_path: Path) -> None:
    folder = write_toy(tmp_path, (12, 25), missing=True)
    split, _ = uea.read_split(folder / "Toy/Toy_TRAIN.ts")
    data = load(folder)
    assert (data.train[0, 1, 3:5] == data.padding[1]).all()
    unit = (data.train[1, 0, 1] - data.train[1, 0, 0]) / (split[1][0, 1] - split[1][0, 0])
    for padded, series in zip(data.train, split, strict=True):
        n_steps = series.shape[1]
        expected = np.nan_to_num(series) * unit + data.padding[:, None]
        np.testing.assert_allclose(padded[:, :n_steps], expected, rtol=1e-5, atol=1e-6)
        assert (padded[:, n_steps:] == data.padding[:, None]).all()


def write_changed(folder: Path, new_folder: Path, change_value: Callable[[float], float]) -> Path:
    """Write the toy with all values changed; return the folder of data sets."""
    (new_folder / "Toy").mkdir(parents=True)
    for path in (folder / "Toy").glob("*.ts"):
        header, _, rows = path.read_text().partition("@data\n")
        rows = re.sub(r"-?\d+\.\d+", lambda number: repr(change_value(float(number[0]))), rows)
        (new_folder / "Toy" / path.name).write_text(f"{header}@data\n{rows}")
    return new_folder


@pytest.mark.parametrize("unit", [2.0**40, 1e30, 1e-300])
def test_scores_do_not_depend_on_the_unit(tmp_path: Path, unit: float) -> None:
    folder = write_toy(tmp_path / "data", (14, 20))
    scaled = write_changed(folder, tmp_path / "scaled", lambda value: value * unit)
    plain, data = load(folder), load(scaled)
    ratio = data.train.std() / plain.train.std()
    assert 0.5 <= ratio <= 2  # by a power of two, or the number beside it
    np.testing.assert_allclose(data.train / ratio, plain.train, rtol=1e-4, atol=1e-5)
    assert run(scaled, tmp_path / "a") == run(folder, tmp_path / "b")


def test_a_small_signal_on_a_large_offset_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_toy(tmp_path / "data")
    plain, near = load(folder), write_changed(folder, tmp_path / "near", lambda value: value + 10)
    load(near)
    assert capsys.readouterr().err == ""
    data = load(write_changed(folder, tmp_path / "far", lambda value: value + 1e6))
    assert re.search(r"TRAIN\.ts holds values \d+ times their spread", capsys.readouterr().err)
    differences, expected = (d.train - d.train[:1, :, :1] for d in (data, plain))
    np.testing.assert_allclose(differences, expected, atol=1e-5)
    assert data.padding.max() < -1e5  # so far below is 0 of the file


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("pattern", "new", "rule"),  # a change of the second series
    [
        ("^[^,]*,", "", "dimension 2 must have 19 values, .* got 20"),
        ("^[^:]*:", "", "dimensions must be 2, .* got 1"),
        (":up", "", "dimensions must be 2, .* got 1"),
        (":", ":1.0:", "dimensions must be 2, .* got 3"),
        (":", ",1.0:", "dimension 2 must have 21 values, .* got 20"),
        (r"\.", ",", "dimension 2 must have 21 values, .* got 20"),  # a decimal comma
        (r",[^,]*,", ",1,000.5,", "dimension 2 must have 21 values, .* got 20"),
        (",", ",,", r"values must be decimal numbers, \? or NaN, got nothing"),
        ("^", "(0,", r"values must be decimal numbers, \? or NaN, got \(0"),  # a time stamp
        (",[^,]*,", ",1e309,", "values must be finite .*, got inf"),
        ("up$", "sideways", "the label must be one of up, down, flat, got sideways"),
    ],
)
def test_wrong_series_is_an_error_with_file_and_line(
    tmp_path: Path, pattern: str, new: str, rule: str
) -> None:
    folder = write_toy(tmp_path)
    change(folder / "Toy/Toy_TRAIN.ts", pattern, new, line=FIRST_LINE + 1)
    with pytest.raises(
        errors.UserError, match=rf"^\S*Toy_TRAIN\.ts, line {FIRST_LINE + 1}: {rule}; fix the line"
    ):
        run(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    "field",
    ["1_0", "inf", "-Infinity", "nan", "-NaN", "-?", "1?", "0x1", "1 2", "٣", "\uff11", ".", "e5"],
)
def test_only_decimal_numbers_are_values(tmp_path: Path, field: str) -> None:
    path = write_toy(tmp_path) / "Toy/Toy_TRAIN.ts"
    change(path, ",[^,]*,", f",{field},", line=FIRST_LINE + 2)
    message = rf"line {FIRST_LINE + 2}: values must be decimal .*, got {re.escape(field)};"
    with pytest.raises(errors.UserError, match=message):
        uea.read_split(path)


@pytest.mark.parametrize(
    ("pattern", "new", "rule"),
    [
        ("(?s).+", "", "line 1: the header must end with @data, got nothing"),
        ("@data\n", "", r"line \d+: the header must end with @data, got"),
        ("(?s)@data.*", "end", f"line {FIRST_LINE - 1}: the header must end with @data, got end"),
        ("(?s)@data.*", "@data", f"line {FIRST_LINE - 1}: @data must be followed by series"),
        ("@dimensions 2", "@dimensions 3", f"line {FIRST_LINE}: dimensions must be 3, .*got 2"),
        ("@univariate false", "@univariate true", f"line {FIRST_LINE}: dimensions must be 1, .*2"),
        ("# ", "@equalLength true\n@seriesLength 0\n", "dimension 1 must have 0 values, .*got 20"),
        ("@dimensions 2", "@dimensions 2 3", "line 5: @dimensions must be a whole number, got 2 3"),
        (
            "@dimensions 2",
            "@dimensions \uff12",
            "line 5: @dimensions must be a whole number, got \uff12",
        ),
        ("# ", "@seriesLength\n", "line 1: @serieslength must be a whole number, got nothing"),
    ],
)
def test_wrong_header_is_an_error(tmp_path: Path, pattern: str, new: str, rule: str) -> None:
    path = write_toy(tmp_path) / "Toy/Toy_TRAIN.ts"
    change(path, pattern, new)
    with pytest.raises(errors.UserError, match=f"Toy_TRAIN.ts, .*{rule}"):
        uea.read_split(path)


@pytest.mark.parametrize(
    ("split", "classes", "rule"),
    [
        ("TRAIN", ["up", "down", "down"], "class up of .*TRAIN.ts must have at least 2 series"),
        ("TRAIN", ["up", "up"], "the same classes, at least 2, got up and down, flat, up"),
        ("TEST", ["up"], "the same classes, at least 2, got down, flat, up and up"),
    ],
)
def test_classes_that_cannot_be_scored_are_an_error(
    tmp_path: Path, split: str, classes: list[str], rule: str
) -> None:
    folder = write_toy(tmp_path)
    values = make_series(3, 1, (20, 20))
    series = [(values[0][0], label) for label in classes]
    (folder / f"Toy/Toy_{split}.ts").write_text(ts_text(series))
    with pytest.raises(errors.UserError, match=rule):
        load(folder)


def test_other_channels_in_the_test_split_are_an_error(tmp_path: Path) -> None:
    path = write_toy(tmp_path) / "Toy/Toy_TEST.ts"
    text = re.sub("(?m)^[-0-9][^:]*:", "", path.read_text())  # the first channel of each series
    path.write_text(text.replace("@dimensions 2", ""))
    with pytest.raises(
        errors.UserError, match=r"dimensions of .*TEST\.ts must be 2 as in .*, got 1"
    ):
        load(tmp_path)


def test_short_series_are_an_error(tmp_path: Path) -> None:
    rule = r"series of .*Toy_TRAIN\.ts and Toy_TEST\.ts must have at least 9 steps, got 8"
    with pytest.raises(errors.UserError, match=rule):
        run(write_toy(tmp_path, (8, 8)), tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (["--dataset_dir", "nowhere"], "--dataset_dir must be a folder, got nowhere"),
        (["--dataset", "Nothing"], r"--dataset must be a folder of .* \(Toy\), got Nothing"),
        (["--dataset", "../data/Toy"], r"--dataset must be a folder of .* \(Toy\), got \.\./data"),
        (["--dataset", "all"], "--dataset must be a folder of .*got Epilepsy"),
        (["--n_projections", "0"], "n_projections.*must be a whole number of at least 1, got 0"),
        (["--seeds", "x"], "seeds.*must be a number or a range like 0-9"),
        (["--device", "tpu"], "device must be auto, cpu"),
    ],
)
def test_bad_flags(tmp_path: Path, flags: list[str], pattern: str) -> None:
    with pytest.raises(errors.UserError, match=pattern):
        run(write_toy(tmp_path / "data"), tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_an_error_that_lists_the_folder(tmp_path: Path) -> None:
    folder = write_toy(tmp_path)
    (folder / "Toy/Toy_TEST.ts").rename(folder / "Toy/Toy_TEST.arff")
    (folder / "Toy/Toy_TEST.ts").mkdir()
    rule = r"must hold the files Toy_TRAIN\.ts and Toy_TEST\.ts, got Toy_TEST\.arff, Toy_TRAIN\.ts;"
    with pytest.raises(errors.UserError, match=rule):
        run(folder, tmp_path / "out")
