"""Time series: against a slow textbook version, both file formats, bad input, real data."""

import csv
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from command_line import UserError, run_script
from sinbad_time_series import (
    count_dilations,
    main,
    project_series,
    score_class,
    score_seed,
    window_elements,
)
from sinbad_utils import random_directions
from uea_files import DataSet, load_data_set, read_split

REPOSITORY = Path(__file__).parent.parent
REAL_DATA = Path(os.environ.get("UEA_DIR", REPOSITORY.parent / "shared/data/uea"))
CPU = torch.device("cpu")
CLASSES = ("up", "down", "flat")
Array = NDArray[np.float64]

needs_real_data = pytest.mark.skipif(
    not (REAL_DATA / "RacketSports").is_dir() or not (REAL_DATA / "NATOPS").is_dir(),
    reason=f"RacketSports and NATOPS of the UEA archive are not in {REAL_DATA} (or set UEA_DIR)",
)


# ---------------------------------------------------------------- files made here


def make_series(seed: int, n_each: int, lengths: tuple[int, int]) -> list[tuple[Array, str]]:
    """Draw series of 2 channels with a trend of their class; lengths from .. to, both included."""
    generator = np.random.default_rng(seed)
    drawn = []
    for label, trend in zip(CLASSES, (1.0, -1.0, 0.0), strict=True):
        for _ in range(n_each):
            n_steps = int(generator.integers(lengths[0], lengths[1] + 1))
            noise = generator.normal(size=(2, n_steps))
            drawn.append((noise + trend * np.linspace(-1, 1, n_steps), label))
    return drawn


def field(value: float) -> str:
    """Write a value as the archive does."""
    return "?" if np.isnan(value) else f"{value:.6f}"


def ts_text(series: list[tuple[Array, str]], header_end: str = "@data\n") -> str:
    """Write series as .ts."""
    head = "# made by a test\n@problemName Toy\n@timeStamps false\n@univariate false\n"
    head += f"@dimensions 2\n@classLabel true {' '.join(CLASSES)}\n{header_end}"
    rows = [":".join([*(",".join(map(field, row)) for row in one), label]) for one, label in series]
    return head + "\n".join(rows) + "\n"


def arff_text(series: list[tuple[Array, str]], n_steps: int) -> str:
    """Write series as relational .arff, short ones padded with "?" as the archive does."""
    head = "% made by a test\n@relation Toy\n\n@attribute relationalAtt relational\n"
    head += "".join(f"@attribute att{i} numeric\n" for i in range(n_steps))
    head += f"@end relationalAtt\n@attribute activity {{{','.join(CLASSES)}}}\n\n@data\n"
    rows = []
    for one, label in series:
        padding = ["?"] * (n_steps - one.shape[1])
        dimensions = [",".join([*map(field, row), *padding]) for row in one]
        rows.append("'" + "\\n".join(dimensions) + f"',{label}")
    return head + "\n".join(rows) + "\n"


def write_toy(
    folder: Path, lengths: tuple[int, int] = (20, 20), name: str = "Toy", missing: bool = False
) -> Path:
    """Write a data set in both formats; return the folder of data sets."""
    (folder / name).mkdir(parents=True)
    splits = {"TRAIN": make_series(1, 6, lengths), "TEST": make_series(2, 4, lengths)}
    if missing:
        for series in splits.values():
            series[0][0][1, 3:5] = np.nan
    longest = max(one.shape[1] for series in splits.values() for one, _ in series)
    for split, series in splits.items():
        (folder / name / f"{name}_{split}.ts").write_text(ts_text(series))
        (folder / name / f"{name}_{split}.arff").write_text(arff_text(series, longest))
    return folder


def run(folder: Path, out: Path, *flags: str) -> str:
    """Run the script on the toy; return its CSV."""
    main(["--dataset_dir", str(folder), "--dataset", "Toy", "--out", str(out),
          "--n_projections", "7", "--n_quantiles", "4", "--device", "cpu", *flags])  # fmt: skip
    return (out / "time_series.csv").read_text()


def replace_in(path: Path, old: str, new: str) -> None:
    """Replace the first occurrence, which must be there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def line_of(path: Path, n: int) -> str:
    """Return line `n` of a file, from 1."""
    return path.read_text().splitlines()[n - 1]


# ---------------------------------------------------------------- the textbook


def textbook_descriptor(
    series: Array, directions: Array, low: Array, high: Array, n_quantiles: int
) -> Array:
    """Compute DESIGN.md's descriptor of one series with loops."""
    values = textbook_values(series, directions)
    n_steps = values.shape[1]
    descriptor = []
    for j in range(len(directions)):
        for q in range(n_quantiles):
            threshold = low[j] + (high[j] - low[j]) * (q + 1) / (n_quantiles + 1)
            descriptor.append(sum(values[j, t] < threshold for t in range(n_steps)) / n_steps)
    return np.array(descriptor)


def textbook_values(series: Array, directions: Array) -> Array:
    """Project each time step's windows on each direction: (directions, steps)."""
    channels, n_steps = series.shape
    elements = []
    for t in range(n_steps):
        element = []
        for dilation in range(1, min(n_steps // 9, 10) + 1):
            for channel in range(channels):
                for k in range(-4, 5):
                    at = t + k * dilation
                    element.append(series[channel, at] if 0 <= at < n_steps else 0.0)
        elements.append(element)
    return directions @ np.array(elements).T


def textbook_scores(normal: Array, test: Array, directions: Array, n_quantiles: int) -> Array:
    """Score by a p x p LedoitWolf covariance and its inverse."""
    pooled = np.concatenate([textbook_values(one, directions) for one in normal], axis=1)
    low, high = (np.quantile(pooled, share, axis=1) for share in (0.01, 0.99))
    described, test_described = (
        np.array([textbook_descriptor(one, directions, low, high, n_quantiles) for one in series])
        for series in (normal, test)
    )
    fitted = LedoitWolf().fit(described)
    inverse = np.linalg.inv(fitted.covariance_)
    return np.array([(d - fitted.location_) @ inverse @ (d - fitted.location_)
                     for d in test_described])  # fmt: skip


@pytest.mark.parametrize("n_steps", [9, 20, 31])
def test_scores_equal_the_textbook(n_steps: int) -> None:
    generator = np.random.default_rng(n_steps)
    normal = np.float32(generator.normal(size=(7, 2, n_steps)))
    test = np.float32(generator.normal(size=(5, 2, n_steps)) * 1.5)
    n_dilations = count_dilations(n_steps)
    directions = random_directions(6, n_dilations * 2 * 9, key=(3,))
    wanted = textbook_scores(
        normal.astype(float), test.astype(float), directions.double().numpy(), 4
    )
    normal_values, test_values = (
        project_series(torch.from_numpy(series), directions, n_dilations)
        for series in (normal, test)
    )
    scores = score_class(normal_values, test_values, 4)
    np.testing.assert_allclose(scores, wanted, rtol=1e-6)


def test_roc_auc_of_a_data_set_equals_the_textbook(tmp_path: Path) -> None:
    data = load_data_set(write_toy(tmp_path, (14, 20)), "Toy", "ts", None)
    assert data.train.shape == (18, 2, 20)
    directions = random_directions(7, 2 * 2 * 9, key=(5,)).double().numpy()
    wanted = [
        100 * roc_auc_score(data.test_labels != name, textbook_scores(
            data.train[data.train_labels == name].astype(float),
            data.test.astype(float), directions, 4))
        for name in sorted(CLASSES)
    ]  # fmt: skip
    np.testing.assert_allclose(score_seed(data, 5, 7, 4, CPU), wanted)


@pytest.mark.parametrize(("n_steps", "wanted"), [(9, 1), (17, 1), (18, 2), (90, 10), (400, 10)])
def test_number_of_dilations(n_steps: int, wanted: int) -> None:
    assert count_dilations(n_steps) == wanted


def test_order_of_the_elements_is_ignored() -> None:
    series = torch.randn(9, 2, 30, generator=torch.Generator().manual_seed(0))
    values = project_series(series, random_directions(5, 3 * 2 * 9, key=(0,)), 3)
    shuffled = values[:, :, torch.randperm(30, generator=torch.Generator().manual_seed(1))]
    assert not torch.equal(values, shuffled)
    one, other = (score_class(v[:6], v, 4) for v in (values, shuffled))
    np.testing.assert_array_equal(one, other)


def test_batches_of_series_change_no_number() -> None:
    series = torch.randn(150, 2, 20, generator=torch.Generator().manual_seed(0))
    directions = random_directions(5, 2 * 2 * 9, key=(0,))
    alone = torch.cat([project_series(one[None], directions, 2) for one in series])
    assert torch.equal(project_series(series, directions, 2), alone)


def test_elements_do_not_cross_series() -> None:
    series = torch.zeros(2, 1, 9)
    series[1] = 1.0
    elements = window_elements(series, 1)
    assert elements.shape == (2, 9, 9)
    assert elements[0].sum() == 0
    assert elements[1, :, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]  # four steps of padding


@pytest.mark.parametrize("n_normal", [2, 3])
def test_very_few_normal_series_give_finite_scores(n_normal: int) -> None:
    values = torch.randn(8, 5, 30, generator=torch.Generator().manual_seed(0))
    scores = score_class(values[:n_normal], values, 4)
    assert np.isfinite(scores).all()
    assert scores[:n_normal].max() < scores[n_normal:].min()


def test_equal_normal_series_give_finite_scores() -> None:
    values = torch.randn(4, 5, 30, generator=torch.Generator().manual_seed(0))
    scores = score_class(values[:1].repeat(3, 1, 1), values, 4)
    assert np.isfinite(scores).all()
    assert scores[0] < 1e-9 < scores[1:].min()


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


# ---------------------------------------------------------------- results


def test_results_agree_and_repeat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_toy(tmp_path / "data")
    first = run(folder, tmp_path / "a", "--seeds", "0-1", "4")
    table = capsys.readouterr().out
    assert run(folder, tmp_path / "b", "--seeds", "0-1", "4") == first
    texts = {(tmp_path / out / "time_series.json").read_bytes() for out in "ab"}
    assert len(texts) == 1
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "time_series.csv", "time_series.json",
    ]  # fmt: skip
    rows = list(csv.DictReader(first.splitlines()))
    order = itertools.product(["0", "1", "4"], sorted(CLASSES))
    assert [(row["seed"], row["class"]) for row in rows] == list(order)
    values = np.array([float(row["roc_auc_percent"]) for row in rows]).reshape(3, 3)
    found = json.loads(texts.pop())["datasets"]["Toy"]
    assert found["mean"] == pytest.approx(values.mean())
    assert found["std"] == pytest.approx(values.mean(1).std(ddof=1))
    assert found["published"] is None
    cells = next(line for line in table.splitlines() if "**mean**" in line).split("|")
    assert float(cells[3]) == pytest.approx(values.mean(), abs=0.051)


def test_seeds_do_not_depend_on_each_other(tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "data")
    both = run(folder, tmp_path / "a", "--seeds", "0", "3").splitlines()
    alone = run(folder, tmp_path / "b", "--seeds", "3").splitlines()
    assert both[4:] == alone[1:]
    assert both[1:4] != alone[1:]


# ---------------------------------------------------------------- the archive's own files


@needs_real_data
def test_real_formats_are_the_same_to_the_bit() -> None:
    loaded: list[DataSet] = [
        load_data_set(REAL_DATA, "RacketSports", suffix, None) for suffix in ("ts", "arff")
    ]
    ts, arff = loaded
    assert ts.train.shape == (151, 6, 30)
    assert ts.train.tobytes() == arff.train.tobytes()
    assert ts.test.tobytes() == arff.test.tobytes()
    assert score_seed(ts, 0, 20, 20, CPU) == score_seed(arff, 0, 20, 20, CPU)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch have one thread: several that wait for each other would count as busy."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@needs_real_data
def test_real_results_are_near_the_published(one_thread: None, tmp_path: Path) -> None:
    started = time.process_time()  # others may be busy on the same cores
    main(["--dataset_dir", str(REAL_DATA), "--dataset", "RacketSports", "NATOPS",
          "--seeds", "0-1", "--out", str(tmp_path), "--device", "cpu"])  # fmt: skip
    assert time.process_time() - started < 20
    found = json.loads((tmp_path / "time_series.json").read_text())["datasets"]
    assert found["RacketSports"]["mean"] == pytest.approx(91.9, abs=0.8)  # 10 seeds: 91.9 +- 0.17
    assert found["NATOPS"]["mean"] == pytest.approx(96.1, abs=0.8)  # 10 seeds: 96.1 +- 0.16
