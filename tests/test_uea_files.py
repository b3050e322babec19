"""Files of the UEA archive: both formats, missing values, and one clear line for a wrong one."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from uea_toy import line_of, make_series, replace_in, run, write_toy

from command_line import UserError, run_script
from sinbad_time_series import main
from uea_files import load_data_set, read_split

# ---------------------------------------------------------------- files


@pytest.mark.parametrize("lengths", [(20, 20), (12, 25)])
def test_both_formats_give_the_same_bytes(tmp_path: Path, lengths: tuple[int, int]) -> None:
    folder = write_toy(tmp_path, lengths, missing=True)
    ts, arff = (load_data_set(folder, "Toy", suffix, None) for suffix in ("ts", "arff"))
    assert ts.train.tobytes() == arff.train.tobytes()
    assert ts.test.tobytes() == arff.test.tobytes()
    assert ts.train_labels.tolist() == arff.train_labels.tolist()
    csvs = {run(folder, tmp_path / f, "--format", f, "--seeds", "0-2") for f in ("ts", "arff")}
    assert len(csvs) == 1


def test_missing_values_and_padding_are_zero(tmp_path: Path) -> None:
    folder = write_toy(tmp_path, (12, 25), missing=True)
    train = read_split(folder / "Toy/Toy_TRAIN.ts")
    data = load_data_set(folder, "Toy", "ts", None)
    assert np.isnan(train.series[0][1, 3:5]).all()
    assert (data.train[0, 1, 3:5] == 0).all()
    for padded, series in zip(data.train, train.series, strict=True):
        n_steps = series.shape[1]
        np.testing.assert_array_equal(padded[:, :n_steps], np.float32(np.nan_to_num(series)))
        assert (padded[:, n_steps:] == 0).all()


def test_values_and_labels_are_those_written(tmp_path: Path) -> None:
    folder = write_toy(tmp_path)
    wanted = make_series(1, 6, (20, 20))
    for suffix in ("ts", "arff"):
        split = read_split(folder / f"Toy/Toy_TRAIN.{suffix}")
        np.testing.assert_allclose(split.series, [one for one, _ in wanted], atol=5.1e-7)
        assert split.labels == [label for _, label in wanted]
        first = line_of(split.path, split.lines[0])
        assert f"{wanted[0][0][0, 0]:.6f}" in first


def test_spoken_digits_keep_lengths_20_to_50(tmp_path: Path) -> None:
    name = "SpokenArabicDigits"
    folder = write_toy(tmp_path, (15, 60), name=name)
    data = load_data_set(folder, name, "ts", (20, 50))
    lengths = [s.shape[1] for s in read_split(folder / name / f"{name}_TRAIN.ts").series]
    assert min(lengths) < 20 and max(lengths) > 50
    assert len(data.train) == sum(20 <= n <= 50 for n in lengths)
    assert data.train.shape[2] <= 50


def test_windows_line_ends_are_read(tmp_path: Path) -> None:
    folder = write_toy(tmp_path)
    for suffix in ("ts", "arff"):
        path = folder / f"Toy/Toy_TRAIN.{suffix}"
        unix = read_split(path)
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        np.testing.assert_array_equal(read_split(path).series, unix.series)


@pytest.mark.parametrize("suffix", ["ts", "arff"])
def test_byte_order_marks_and_spaces_are_read(tmp_path: Path, suffix: str) -> None:
    path = write_toy(tmp_path, missing=True) / f"Toy/Toy_TRAIN.{suffix}"
    plain = read_split(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b",?,", b", ? ,"))
    np.testing.assert_array_equal(read_split(path).series, plain.series)


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
    n = read_split(train).lines[1]
    line = line_of(train, n)
    replace_in(train, line, ("'" if line[0] == "'" else "") + line.partition(",")[2])
    return rf"{train.name}, line {n}: dimensions must have 19 values as the first, got 20"


def bad_dimension_left_out(train: Path, test: Path) -> str:
    n = read_split(train).lines[1]
    line = line_of(train, n)
    separator = ":" if train.suffix == ".ts" else "\\n"
    quote = "" if train.suffix == ".ts" else "'"
    replace_in(train, line, quote + line.split(separator, 1)[1])
    return rf"{train.name}, line {n}: dimensions must be 2.*got 1"


def bad_all_longer(train: Path, test: Path) -> str:
    """Give every dimension of an .arff series a value more than the header has attributes."""
    n = read_split(train).lines[1]
    line = line_of(train, n)
    longer = line.replace("\\n", ",1.0\\n").replace("',", ",1.0',")
    replace_in(train, line, longer if train.suffix == ".arff" else line.replace(":", ",1.0:", 1))
    return rf"{train.name}, line {n}: dimensions must have 2\d values"


def bad_field(train: Path, test: Path) -> str:
    n = read_split(train).lines[2]
    line = line_of(train, n)
    replace_in(train, line, re.sub(r",[^,]*,", ",abc,", line, count=1))
    return rf"{train.name}, line {n}: .*numbers or \?.*abc"


def bad_infinite(train: Path, test: Path) -> str:
    n = read_split(train).lines[2]
    line = line_of(train, n)
    replace_in(train, line, re.sub(r",[^,]*,", ",1e99,", line, count=1))
    return rf"{train.name}, line {n}: values must be finite, got 1e\+99"


def bad_empty(train: Path, test: Path) -> str:
    test.write_text("")
    return rf"{test.name}, line 1: must hold series, got an empty file"


def bad_one_training_series(train: Path, test: Path) -> str:
    split = read_split(train)
    lines = train.read_text().splitlines()
    ups = [n for n, label in zip(split.lines, split.labels, strict=True) if label == "up"]
    train.write_text("\n".join(line for n, line in enumerate(lines, 1) if n not in ups[1:]) + "\n")
    return rf"{train.name}, line {ups[0]}: class up must have at least 2 training series.*got 1"


def bad_label_only_in_test(train: Path, test: Path) -> str:
    lines = train.read_text().splitlines()
    train.write_text("\n".join(row for row in lines if not row.endswith(("',flat", ":flat"))))
    split = read_split(test)
    return rf"{test.name}, line {split.lines[split.labels.index('flat')]}: the label .*got flat"


def bad_undeclared_label(train: Path, test: Path) -> str:
    n = read_split(test).lines[0]
    line = line_of(test, n)
    replace_in(test, line, line.removesuffix("up") + "sideways")
    return rf"{test.name}, line {n}: .*label.*sideways"


def bad_one_class_in_test(train: Path, test: Path) -> str:
    lines = test.read_text().splitlines()
    endings = ("',flat", ":flat", "',down", ":down")
    test.write_text("\n".join(row for row in lines if not row.endswith(endings)))
    return rf"{test.name}, line \d+: class \w+ and another must be in the test split, got up"


BAD = [
    bad_no_data_tag, bad_header_only, bad_no_series, bad_ragged, bad_dimension_left_out,
    bad_all_longer, bad_field, bad_infinite, bad_empty, bad_one_training_series,
    bad_label_only_in_test, bad_undeclared_label, bad_one_class_in_test,
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["ts", "arff"])
@pytest.mark.parametrize("field", ["1_0", "-?", "??", "1?", "'1", "_", "1 2"])
def test_only_numbers_and_question_marks_are_values(
    tmp_path: Path, field: str, suffix: str
) -> None:
    path = write_toy(tmp_path) / f"Toy/Toy_TRAIN.{suffix}"
    n = read_split(path).lines[2]
    line = line_of(path, n)
    replace_in(path, line, re.sub(r",[^,]*,", f",{field},", line, count=1))
    message = rf"{path.name}, line {n}: values must be numbers or \?, got {re.escape(field)};"
    with pytest.raises(UserError, match=message):
        read_split(path)


@pytest.mark.parametrize("suffix", ["ts", "arff"])
@pytest.mark.parametrize("spoil", BAD)
def test_bad_file_is_one_line_with_file_and_line(
    tmp_path: Path, spoil: Callable[[Path, Path], str], suffix: str
) -> None:
    folder = write_toy(tmp_path)
    train, test = (folder / f"Toy/Toy_{split}.{suffix}" for split in ("TRAIN", "TEST"))
    pattern = spoil(train, test)
    with pytest.raises(UserError, match=pattern) as caught:
        run(folder, tmp_path / "out", "--format", suffix)
    assert "\n" not in str(caught.value).strip()
    assert not (tmp_path / "out").exists()


def test_time_stamps_are_refused(tmp_path: Path) -> None:
    folder = write_toy(tmp_path)
    replace_in(folder / "Toy/Toy_TRAIN.ts", "@timeStamps false", "@timeStamps true")
    with pytest.raises(UserError, match=r"Toy_TRAIN\.ts, line 3: @timeStamps must be false"):
        run(folder, tmp_path / "out")


def test_short_series_are_refused(tmp_path: Path) -> None:
    folder = write_toy(tmp_path, (8, 8))
    named = r"series of .*Toy_TRAIN\.ts and Toy_TEST\.ts"
    with pytest.raises(UserError, match=f"{named} must have at least 9 steps, got 8"):
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
    with pytest.raises(UserError, match=pattern):
        run(write_toy(tmp_path / "data"), tmp_path / "out", *flags)


def test_missing_files_are_listed(tmp_path: Path) -> None:
    folder = write_toy(tmp_path)
    (folder / "Toy/Toy_TEST.ts").unlink()
    assert run(folder, tmp_path / "out")  # auto takes the .arff files
    with pytest.raises(UserError, match=r"must hold Toy_TRAIN\.ts .*got .*Toy_TRAIN\.ts"):
        run(folder, tmp_path / "out", "--format", "ts")


def test_a_folder_with_the_name_of_a_file_is_called_so(tmp_path: Path) -> None:
    folder = write_toy(tmp_path)
    (folder / "Toy/Toy_TEST.ts").unlink()
    (folder / "Toy/Toy_TEST.ts").mkdir()
    with pytest.raises(UserError, match=r"must hold Toy_TRAIN\.ts .*got .*Toy_TEST\.ts \(a folder"):
        run(folder, tmp_path / "out", "--format", "ts")


def test_error_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_script(main, ["--dataset_dir", str(tmp_path / "none"), "--dataset", "RacketSports"])
    shown = capsys.readouterr()
    assert (caught.value.code, shown.out) == (2, "")
    assert re.fullmatch(r"error: --dataset_dir must be a folder, got .*\n", shown.err)
