"""UEA files, .ts or the same as relational .arff -> arrays of series, centred and scaled.

A file that does not follow its format is an error of one line that names the file and the line.
"""

import io
import logging
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.io import arff

from sinbad import errors

log = logging.getLogger(__name__)

ARCHIVE_PAGE = "https://www.timeseriesclassification.com"
FORMATS = ("ts", "arff")
LARGEST_VALUE = 1e307  # differences of two values stay finite in float64
LARGEST_SCALED = 2.0**100  # sums of projected values stay finite in float32
FAR_FROM_ZERO = 50.0  # times the usual distance of a value to its channel's median

Array = NDArray[np.float64]
# What a header says of every series: labels, number of channels, of steps; empty or None: nothing.
Declared = tuple[tuple[str, ...], int | None, int | None]


class Series(NamedTuple):
    """One series: its line in the file (from 1), values (channels, steps), NaN = missing, label."""

    line: int
    values: Array
    label: str


class DataSet(NamedTuple):
    """A data set, padded to its longest series, in units in which float32 loses nothing.

    Each channel is shifted by a value of its own and all are divided by one power of two.

    Attributes
    ----------
    train, test : (n_series, channels, steps), float32
    train_labels, test_labels : (n_series,), str
    zeros : (channels,), float32
        What 0 in the file's units has become: stands for padding and missing values.
    """

    train: NDArray[np.float32]
    test: NDArray[np.float32]
    train_labels: NDArray[np.str_]
    test_labels: NDArray[np.str_]
    zeros: NDArray[np.float32]


# ---------------------------------------------------------------- files


def find_files(dataset_dir: Path, name: str, file_format: str) -> tuple[Path, Path]:
    """Return the training and the test file of a data set; `file_format` is ts, arff or auto."""
    cure = f"unpack the archive of {ARCHIVE_PAGE} there, or pass --dataset_dir"
    if not dataset_dir.is_dir():
        raise errors.UserError(f"--dataset_dir must be a folder, got {dataset_dir}; {cure}")
    folder = dataset_dir / name
    if not folder.is_dir():
        found = ", ".join(sorted(path.name for path in dataset_dir.iterdir() if path.is_dir()))
        rule = f"--dataset must be a folder of {dataset_dir} (found: {found or 'none'})"
        raise errors.UserError(f"{rule}, got {name}; {cure}")
    suffixes = FORMATS if file_format == "auto" else (file_format,)
    for suffix in suffixes:
        train, test = (folder / f"{name}_{split}.{suffix}" for split in ("TRAIN", "TEST"))
        if train.is_file() and test.is_file():
            return train, test
    names = sorted(path.name + " (a folder)" * path.is_dir() for path in folder.iterdir())
    wanted = " or .".join(suffixes)
    rule = f"{folder} must hold {name}_TRAIN.{wanted} and {name}_TEST of the same kind"
    raise errors.UserError(f"{rule}, got {', '.join(names) or 'nothing'}; {cure}")


def read_split(path: Path) -> list[Series]:
    """Read a .ts or a relational .arff file; steps at the end without any value are cut off.

    Raises
    ------
    UserError
        If the file does not follow its format; names the file and the line.
    """
    text = path.read_text(encoding="utf-8-sig", errors="backslashreplace")
    lines = text.removesuffix("\n").split("\n")  # splitlines would split at \f and U+2028 too
    is_arff = path.suffix == ".arff"
    start = next((n for n, raw in enumerate(lines, 1) if re.match(r"\s*@data\b", raw, re.I)), 0)
    if not start:
        got = "no @data" if text.strip() else "an empty file"
        raise _line_error(path, len(lines), "the header must end with @data", got)
    try:
        declared = (_arff_header if is_arff else _ts_header)("\n".join(lines[:start]))
    except Exception as error:  # scipy's are of many kinds, StopIteration among them
        rule = "the header must be of relational .arff"
        raise _line_error(path, start, rule, str(error)) from None
    labels, n_channels, n_steps = declared
    split = []
    for line, raw in enumerate(lines[start:], start + 1):
        if not raw.strip() or raw.lstrip()[0] == ("%" if is_arff else "#"):
            continue
        content, _, label = raw.rpartition("," if is_arff else ":")
        dimensions = content.strip(" \t'\"").split("\\n") if is_arff else content.split(":")
        if n_channels not in (None, len(dimensions)):
            rule = f"dimensions must be {n_channels}, as the header or the line before has"
            raise _line_error(path, line, rule, str(len(dimensions)))
        n_channels = len(dimensions)
        values = _values(path, line, dimensions, n_steps)
        label = label.strip(" \t\f\v'\"")
        if labels and label not in labels:
            raise _line_error(path, line, f"the label must be one of {', '.join(labels)}", label)
        filled = np.flatnonzero(~np.isnan(values).all(0))  # .arff pads short series with ?
        split.append(Series(line, values[:, : max(filled, default=-1) + 1], label))
    if not split:
        raise _line_error(path, len(lines), "@data must be followed by series", "none")
    return split


def _line_error(path: Path, line: int, rule: str, got: str) -> errors.UserError:
    """Make the error of one line of a file."""
    got = got if len(got) <= 60 else got[:57] + "..."
    return errors.UserError(
        f"{path}, line {line}: {rule}, got {got}; mend the line or unpack again"
    )


def _ts_header(header: str) -> Declared:
    """Read the header of a .ts file; of a tag that is there twice the last line counts."""
    found = re.findall(r"^\s*(@\w+)[ \t]+(\S.*)", header, re.M)
    tags = {tag.lower(): words.split() for tag, words in found}
    flags = {tag for tag, words in tags.items() if words[0].lower() == "true"}
    numbers = {tag: int(words[0]) for tag, words in tags.items() if words[0].isdecimal()}
    n_channels = 1 if "@univariate" in flags else numbers.get("@dimensions")
    n_steps = numbers.get("@serieslength") if "@equallength" in flags else None
    return tuple(tags.get("@classlabel", [])[1:]), n_channels, n_steps


def _arff_header(header: str) -> Declared:
    """Read the header of a relational .arff file."""
    _, meta = arff.loadarff(io.StringIO(header))
    if meta.types() != ["relational", "nominal"]:
        raise ValueError(f"attributes that are {', '.join(meta.types())}")
    n_attributes = len(re.findall(r"^\s*@attribute\b", header, re.I | re.M))
    return meta[meta.names()[1]][1], None, n_attributes - 2


def _values(path: Path, line: int, dimensions: list[str], n_steps: int | None) -> Array:
    """Read the values of one series: numbers between commas, "?" (or NaN) where one misses."""
    rows: list[list[float]] = []
    for text in dimensions:
        rows.append([])
        for field in map(str.strip, text.split(",")):
            try:  # Python would read 1_0 as 10
                rows[-1].append(float("nan" if field == "?" else field.replace("_", "no digit")))
            except ValueError:
                rule = "values must be numbers or ?"
                raise _line_error(path, line, rule, field or "nothing") from None
        n_steps = len(rows[0]) if n_steps is None else n_steps
        if len(rows[-1]) != n_steps:
            rule = f"dimension {len(rows)} must have {n_steps} values, as the header or the first"
            raise _line_error(path, line, rule, str(len(rows[-1])))
    values = np.array(rows)
    if (abs(values) > LARGEST_VALUE).any():
        got = str(np.nanmax(abs(values)))
        raise _line_error(path, line, f"values must be finite (within {LARGEST_VALUE:g})", got)
    return values


# ---------------------------------------------------------------- arrays


def load_data_set(
    paths: tuple[Path, Path], lengths: tuple[float, float] = (0, np.inf), min_steps: int = 1
) -> DataSet:
    """Read the training and the test file of a data set; centre, scale, pad to the longest series.

    Parameters
    ----------
    lengths : shortest and longest series that are kept, in steps
    min_steps : what the longest series must have

    Raises
    ------
    UserError
        If a file is wrong, or the splits do not fit each other.
    """
    shortest, longest = lengths
    splits = [
        [one for one in read_split(path) if shortest <= one.values.shape[1] <= longest]
        for path in paths
    ]
    for path, kept in zip(paths, splits, strict=True):
        if not kept:
            rule = f"{path} must hold series of {shortest} to {longest} steps"
            raise errors.UserError(f"{rule}, got none; unpack the archive again")
    _check_splits(paths, *splits)
    n_steps = max(one.values.shape[1] for one in chain(*splits))
    if n_steps < min_steps:
        rule = f"series of {paths[0]} and {paths[1].name} must have at least {min_steps} steps"
        raise errors.UserError(f"{rule}, got {n_steps} in the longest; leave out this data set")
    centre, exponent = _fit_units(splits[0])
    padded = [np.zeros((len(split), len(centre), n_steps)) for split in splits]
    for array, one in zip(chain(*padded), chain(*splits), strict=True):
        array[:, : one.values.shape[1]] = np.nan_to_num(one.values)
    with np.errstate(over="ignore"):  # what lies far outside is clipped; the rest changes no bit
        train, test, zeros = (
            np.ldexp(values - centre, -exponent).clip(-LARGEST_SCALED, LARGEST_SCALED)
            for values in (*padded, np.zeros_like(centre))
        )
    far = abs(zeros).max()
    if far > FAR_FROM_ZERO:
        log.warning(
            f"{paths[0]} holds values {far:.0f} times their spread away from 0, which "
            "stands outside the series and where values miss, as in the paper, and may outweigh "
            "them; subtract each channel's mean"
        )
    labels = (np.array([one.label for one in split]) for split in splits)
    return DataSet(np.float32(train), np.float32(test), *labels, np.float32(zeros[:, 0]))


def _fit_units(train: list[Series]) -> tuple[Array, int]:
    """Fit the median of each channel, (channels, 1), and the exponent of the usual distance to it.

    One value of another size would move a mean so far that float64 loses the others.
    """
    pooled = np.concatenate([one.values for one in train], axis=1)  # (channels, steps of all)
    centre = np.array([[_median(channel)] for channel in pooled])
    distances = abs(pooled - centre)
    usual = max(_median(channel[channel > 0]) for channel in distances)
    return centre, int(np.frexp(usual or abs(centre).max())[1])


def _median(values: Array) -> float:
    """Return the upper median of the values that are not NaN; 0 where there are none."""
    present = np.sort(values[~np.isnan(values)])
    return float(present[len(present) // 2]) if len(present) else 0.0


def _check_splits(paths: tuple[Path, Path], train: list[Series], test: list[Series]) -> None:
    """Refuse splits on which some class cannot be fitted or scored."""
    n_channels, n_test_channels = len(train[0].values), len(test[0].values)
    if n_test_channels != n_channels:
        rule = f"dimensions must be {n_channels} as in {paths[0].name}"
        raise _line_error(paths[1], test[0].line, rule, str(n_test_channels))
    counts = Counter(one.label for one in train)
    found = sorted({one.label for one in test})
    for one in test:
        if one.label not in counts:
            rule = f"the label must be one of {paths[0].name} ({', '.join(sorted(counts))})"
            raise _line_error(paths[1], one.line, rule, one.label)
    for one in train:
        if counts[one.label] < 2:
            rule = f"class {one.label} must have at least 2 training series"
            raise _line_error(paths[0], one.line, f"{rule} (a covariance needs them)", "1")
        if one.label not in found or len(found) < 2:
            rule = f"class {one.label} and another must be in the test split"
            raise _line_error(paths[1], test[-1].line, rule, ", ".join(found))
