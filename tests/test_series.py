"""Files of the UEA archive: both formats, missing values, units, one line for a wrong one."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from uea_toy import line_of, make_series, replace_in, run, write_toy

from sinbad import errors, uea
from sinbad_time_series import main


def load(folder: Path, suffix: str, name: str = "Toy", **limits: tuple[int, int]) -> uea.DataSet:
    """Read a data set of a folder of data sets."""
    return uea.load_data_set(uea.find_files(folder, name, suffix), **limits)


def values_of(path: Path) -> list[NDArray[np.float64]]:
    """Return the values of the series of a file."""
    return [one.values for one in uea.read_split(path)]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("lengths", [(20, 20), (12, 25)])
def test_both_formats_give_the_same_bytes(tmp_path: Path, lengths: tuple[int, int]) -> None:
    folder = write_toy(tmp_path, lengths, missing=True)
    ts, arff = (load(folder, suffix) for suffix in ("ts", "arff"))
    assert ts.train.tobytes() == arff.train.tobytes()
    assert ts.test.tobytes() == arff.test.tobytes()
    assert ts.train_labels.tolist() == arff.train_labels.tolist()
    csvs = {run(folder, tmp_path / f, "--format", f, "--seeds", "0-2") for f in ("ts", "arff")}
    assert len(csvs) == 1


def test_missing_values_and_padding_are_zero_in_units_of_the_file(tmp_path: Path) -> None:
    folder = write_toy(tmp_path, (12, 25), missing=True)
    train = values_of(folder / "Toy/Toy_TRAIN.ts")
    assert np.isnan(train[0][1, 3:5]).all()
    data = load(folder, "ts")
    assert (data.train[0, 1, 3:5] == data.zeros[1]).all()
    unit = (data.train[1, 0, 1] - data.train[1, 0, 0]) / (train[1][0, 1] - train[1][0, 0])
    for padded, series in zip(data.train, train, strict=True):
        n_steps = series.shape[1]
        wanted = np.nan_to_num(series) * unit + data.zeros[:, None]
        np.testing.assert_allclose(padded[:, :n_steps], wanted, rtol=1e-5, atol=1e-6)
        assert (padded[:, n_steps:] == data.zeros[:, None]).all()


def test_values_and_labels_are_those_written(tmp_path: Path) -> None:
    folder = write_toy(tmp_path)
    wanted = make_series(1, 6, (20, 20))
    for suffix in ("ts", "arff"):
        path = folder / f"Toy/Toy_TRAIN.{suffix}"
        split = uea.read_split(path)
        np.testing.assert_allclose(values_of(path), [one for one, _ in wanted], atol=5.1e-7)
        assert [one.label for one in split] == [label for _, label in wanted]
        assert f"{wanted[0][0][0, 0]:.6f}" in line_of(path, split[0].line)


def test_only_series_of_the_lengths_asked_for_are_kept(tmp_path: Path) -> None:
    folder = write_toy(tmp_path, (15, 60))
    lengths = [values.shape[1] for values in values_of(folder / "Toy/Toy_TRAIN.ts")]
    assert min(lengths) < 20 and max(lengths) > 50
    data = load(folder, "ts", lengths=(20, 50))
    assert len(data.train) == sum(20 <= n <= 50 for n in lengths)
    assert data.train.shape[2] <= 50
    with pytest.raises(
        errors.UserError, match=r"Toy_TRAIN.ts must hold series of 70 to 80 steps, got"
    ):
        load(folder, "ts", lengths=(70, 80))


@pytest.mark.parametrize("suffix", ["ts", "arff"])
@pytest.mark.parametrize("ends", [b"\r\n", b"\r"])
def test_other_line_ends_are_read(tmp_path: Path, suffix: str, ends: bytes) -> None:
    path = write_toy(tmp_path) / f"Toy/Toy_TRAIN.{suffix}"
    plain = values_of(path)
    path.write_bytes(path.read_bytes().replace(b"\n", ends))
    np.testing.assert_array_equal(values_of(path), plain)


@pytest.mark.parametrize("suffix", ["ts", "arff"])
@pytest.mark.parametrize("space", [" ", "\t", "\x0b", "\x0c", "\x85", "\u2028"])
def test_byte_order_marks_and_spaces_are_read(tmp_path: Path, suffix: str, space: str) -> None:
    path = write_toy(tmp_path, missing=True) / f"Toy/Toy_TRAIN.{suffix}"
    plain = values_of(path)
    text = path.read_text().replace(",?,", f",{space}?{space},")
    path.write_text("\ufeff" + text, encoding="utf-8")
    np.testing.assert_array_equal(values_of(path), plain)


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "data")
    for path in (folder / "Toy").glob("*.ts"):
        path.write_text(path.read_text().replace("up", "größer"), encoding="utf-8")
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "sinbad_time_series.py", "--dataset_dir", str(folder), "--dataset"]
    command += ["Toy", "--out", str(tmp_path / "out"), "--n_projections", "7"]
    root = Path(__file__).parents[1]
    found = subprocess.run(command, cwd=root, env=plain, capture_output=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "größer" in found.stdout.decode("utf-8")
    assert "größer" in (tmp_path / "out/time_series.csv").read_text(encoding="utf-8")


# ---------------------------------------------------------------- units


def scaled(folder: Path, to: Path, change: Callable[[float], float]) -> Path:
    """Write the toy's .ts files with all values changed; return the folder of data sets."""
    (to / "Toy").mkdir(parents=True)
    for path in (folder / "Toy").glob("*.ts"):
        head, _, rows = path.read_text().partition("@data\n")
        changed = re.sub(r"-?\d+\.\d+", lambda number: repr(change(float(number[0]))), rows)
        (to / "Toy" / path.name).write_text(f"{head}@data\n{changed}")
    return to


@pytest.mark.parametrize("unit", [2.0**40, 1e-30, 1e30, 1e-300])
def test_scores_do_not_depend_on_the_unit(tmp_path: Path, unit: float) -> None:
    folder = write_toy(tmp_path / "data", (14, 20))
    plain = load(folder, "ts")
    data = load(scaled(folder, tmp_path / "scaled", lambda value: value * unit), "ts")
    ratio = data.train.std() / plain.train.std()
    assert 0.5 <= ratio <= 2  # by a power of two, or the number beside it
    np.testing.assert_allclose(data.train / ratio, plain.train, rtol=1e-4, atol=1e-5)
    wanted = run(folder, tmp_path / "a", "--seeds", "0-2")
    assert run(tmp_path / "scaled", tmp_path / "b", "--seeds", "0-2") == wanted


def test_a_small_signal_on_a_great_offset_is_kept(tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "data")
    offset = load(scaled(folder, tmp_path / "offset", lambda value: value + 1e6), "ts")
    plain = load(folder, "ts")
    np.testing.assert_allclose(
        offset.train - offset.train[:1, :, :1], plain.train - plain.train[:1, :, :1], atol=1e-5
    )
    assert offset.zeros.max() < -1e5  # so far below is what 0 has become


def test_values_far_from_zero_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_toy(tmp_path / "data")
    load(scaled(folder, tmp_path / "near", lambda value: value + 10), "ts")
    assert capsys.readouterr().err == ""
    load(scaled(folder, tmp_path / "far", lambda value: value + 1000), "ts")
    assert re.search(r"TRAIN\.ts holds values \d+ times their spread", capsys.readouterr().err)


# ---------------------------------------------------------------- bad input


def bad_no_data_tag(train: Path, test: Path) -> str:
    replace_in(train, "@data\n", "")
    return rf"{train.name}, line \d+: (@data must stand before|the header must end with @data)"


def bad_header_only(train: Path, test: Path) -> str:
    train.write_text(train.read_text().split("@data")[0])
    return rf"{train.name}, line \d+: the header must end with @data"


def bad_no_series(train: Path, test: Path) -> str:
    train.write_text(train.read_text().split("@data")[0] + "@data\n")
    return rf"{train.name}, line \d+: @data must be followed by series"


def bad_ragged(train: Path, test: Path) -> str:
    """Leave out the first value of the second series."""
    n = uea.read_split(train)[1].line
    line = line_of(train, n)
    replace_in(train, line, ("'" if line[0] == "'" else "") + line.partition(",")[2])
    return rf"{train.name}, line {n}: dimension (2 must have 19|1 must have 20) values.*got (20|19)"


def bad_dimension_left_out(train: Path, test: Path) -> str:
    n = uea.read_split(train)[1].line
    line = line_of(train, n)
    separator = ":" if train.suffix == ".ts" else "\\n"
    quote = "" if train.suffix == ".ts" else "'"
    replace_in(train, line, quote + line.split(separator, 1)[1])
    return rf"{train.name}, line {n}: dimensions must be 2.*got 1"


def bad_all_longer(train: Path, test: Path) -> str:
    """Give every dimension of an .arff series a value more than the header has attributes."""
    n = uea.read_split(train)[1].line
    line = line_of(train, n)
    longer = line.replace("\\n", ",1.0\\n").replace("',", ",1.0',")
    replace_in(train, line, longer if train.suffix == ".arff" else line.replace(":", ",1.0:", 1))
    return rf"{train.name}, line {n}: dimension \d must have 2\d values"


def bad_field(train: Path, test: Path) -> str:
    n = uea.read_split(train)[2].line
    line = line_of(train, n)
    replace_in(train, line, re.sub(r",[^,]*,", ",abc,", line, count=1))
    return rf"{train.name}, line {n}: .*numbers or \?.*abc"


def bad_infinite(train: Path, test: Path) -> str:
    n = uea.read_split(train)[2].line
    line = line_of(train, n)
    replace_in(train, line, re.sub(r",[^,]*,", ",1e309,", line, count=1))
    return rf"{train.name}, line {n}: values must be finite .*got inf"


def bad_empty(train: Path, test: Path) -> str:
    test.write_text("")
    return rf"{test.name}, line 1: the header must end with @data, got an empty file"


def bad_one_training_series(train: Path, test: Path) -> str:
    split = uea.read_split(train)
    lines = train.read_text().splitlines()
    ups = [one.line for one in split if one.label == "up"]
    train.write_text("\n".join(line for n, line in enumerate(lines, 1) if n not in ups[1:]) + "\n")
    return rf"{train.name}, line {ups[0]}: class up must have at least 2 training series.*got 1"


def bad_label_only_in_test(train: Path, test: Path) -> str:
    lines = train.read_text().splitlines()
    train.write_text("\n".join(row for row in lines if not row.endswith(("',flat", ":flat"))))
    line = next(one.line for one in uea.read_split(test) if one.label == "flat")
    return rf"{test.name}, line {line}: the label .*got flat"


def bad_undeclared_label(train: Path, test: Path) -> str:
    n = uea.read_split(test)[0].line
    line = line_of(test, n)
    replace_in(test, line, line.removesuffix("up") + "sideways")
    return rf"{test.name}, line {n}: .*label.*sideways"


def bad_one_class_in_test(train: Path, test: Path) -> str:
    lines = test.read_text().splitlines()
    endings = ("',flat", ":flat", "',down", ":down")
    test.write_text("\n".join(row for row in lines if not row.endswith(endings)))
    return rf"{test.name}, line \d+: class \w+ and another must be in the test split, got up"


def bad_declared_length(train: Path, test: Path) -> str:
    if train.suffix == ".ts":
        replace_in(train, "@data", "@equalLength true\n@seriesLength 21\n@data")
    else:
        replace_in(train, "@end relationalAtt", "@attribute one_more numeric\n@end relationalAtt")
    return rf"{train.name}, line \d+: dimension 1 must have 21 values.*got 20"


BAD = [
    bad_no_data_tag,
    bad_header_only,
    bad_no_series,
    bad_ragged,
    bad_dimension_left_out,
    bad_all_longer,
    bad_field,
    bad_infinite,
    bad_empty,
    bad_one_training_series,
    bad_label_only_in_test,
    bad_undeclared_label,
    bad_one_class_in_test,
    bad_declared_length,
]


@pytest.mark.parametrize("suffix", ["ts", "arff"])
@pytest.mark.parametrize("field", ["1_0", "-?", "??", "1?", "'1", "_", "1 2"])
def test_only_numbers_and_question_marks_are_values(
    tmp_path: Path, field: str, suffix: str
) -> None:
    path = write_toy(tmp_path) / f"Toy/Toy_TRAIN.{suffix}"
    n = uea.read_split(path)[2].line
    line = line_of(path, n)
    replace_in(path, line, re.sub(r",[^,]*,", f",{field},", line, count=1))
    message = rf"{path.name}, line {n}: values must be numbers or \?, got {re.escape(field)};"
    with pytest.raises(errors.UserError, match=message):
        uea.read_split(path)


@pytest.mark.parametrize("suffix", ["ts", "arff"])
@pytest.mark.parametrize("spoil", BAD)
def test_bad_file_is_one_line_with_file_and_line(
    tmp_path: Path, spoil: Callable[[Path, Path], str], suffix: str
) -> None:
    folder = write_toy(tmp_path)
    train, test = (folder / f"Toy/Toy_{split}.{suffix}" for split in ("TRAIN", "TEST"))
    pattern = spoil(train, test)
    with pytest.raises(errors.UserError, match=pattern) as caught:
        run(folder, tmp_path / "out", "--format", suffix)
    assert "\n" not in str(caught.value).strip()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "rule"),
    [
        ("@dimensions 3", "dimensions must be 3, .*got 2"),
        ("@dimensions 0", "dimensions must be 0, .*got 2"),
        ("@univariate true", "dimensions must be 1, .*got 2"),
        ("@equalLength true\n@seriesLength 0", "dimension 1 must have 0 values, .*got 20"),
    ],
)
def test_what_the_header_declares_is_held_to(tmp_path: Path, lines: str, rule: str) -> None:
    path = write_toy(tmp_path) / "Toy/Toy_TRAIN.ts"
    replace_in(path, "@data", f"{lines}\n@data")  # the last line of a tag counts
    n = 9 + lines.count("\n")
    with pytest.raises(errors.UserError, match=f"line {n}: {rule}"):
        uea.read_split(path)


def test_time_stamps_are_refused(tmp_path: Path) -> None:
    folder = write_toy(tmp_path)
    train = folder / "Toy/Toy_TRAIN.ts"
    n = uea.read_split(train)[0].line
    replace_in(train, line_of(train, n), "(0," + line_of(train, n).replace(",", "),(1,", 1))
    message = rf"Toy_TRAIN\.ts, line {n}: values must be numbers or \?, got \(0;"
    with pytest.raises(errors.UserError, match=message):
        run(folder, tmp_path / "out")


def test_short_series_are_refused(tmp_path: Path) -> None:
    folder = write_toy(tmp_path, (8, 8))
    named = r"series of .*Toy_TRAIN\.ts and Toy_TEST\.ts"
    with pytest.raises(errors.UserError, match=f"{named} must have at least 9 steps, got 8"):
        run(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (["--dataset_dir", "nowhere"], "--dataset_dir must be a folder, got nowhere"),
        (["--dataset", "Nothing"], r"--dataset must be a folder of .*found: Toy.*, got Nothing"),
        (["--dataset", "all"], "--dataset must be a folder of .*got Epilepsy"),
        (["--n_projections", "0"], "n_projections.*must be a whole number from 1, got 0"),
        (["--seeds", "x"], "seeds.*must be a number or a range like 0-9"),
        (["--device", "tpu"], "device must be auto, cpu"),
    ],
)
def test_bad_flags(tmp_path: Path, flags: list[str], pattern: str) -> None:
    with pytest.raises(errors.UserError, match=pattern):
        run(write_toy(tmp_path / "data"), tmp_path / "out", *flags)


def test_missing_files_are_listed(tmp_path: Path) -> None:
    folder = write_toy(tmp_path)
    (folder / "Toy/Toy_TEST.ts").unlink()
    assert run(folder, tmp_path / "out")  # auto takes the .arff files
    with pytest.raises(errors.UserError, match=r"must hold Toy_TRAIN\.ts .*got .*Toy_TRAIN\.ts"):
        run(folder, tmp_path / "out", "--format", "ts")


def test_a_folder_with_the_name_of_a_file_is_called_so(tmp_path: Path) -> None:
    folder = write_toy(tmp_path)
    (folder / "Toy/Toy_TEST.ts").unlink()
    (folder / "Toy/Toy_TEST.ts").mkdir()
    with pytest.raises(
        errors.UserError, match=r"must hold Toy_TRAIN\.ts .*got .*Toy_TEST\.ts \(a folder"
    ):
        run(folder, tmp_path / "out", "--format", "ts")


def test_error_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        errors.run_script(
            main, ["--dataset_dir", str(tmp_path / "none"), "--dataset", "RacketSports"]
        )
    shown = capsys.readouterr()
    assert (caught.value.code, shown.out) == (2, "")
    assert re.fullmatch(r"error: --dataset_dir must be a folder, got .*\n", shown.err)
