"""Read the data sets of the UEA archive as unpacked: .ts, or the same as relational .arff.

A file that does not follow its format is an error of one line that names the file and the line.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.io import arff

from command_line import UserError

ARCHIVE_PAGE = "https://www.timeseriesclassification.com"
FORMATS = ("ts", "arff")

Series = NDArray[np.float64]  # (channels, steps), NaN where a value is missing


@dataclass(frozen=True)
class Split:
    """One file of the archive.

    Attributes
    ----------
    path : Path
    series : list of (channels, steps), float64
        NaN where a value is missing; steps at the end without any value are cut off.
    labels : list of str
    lines : list of int
        Where each series stands in the file, from 1.
    """

    path: Path
    series: list[Series]
    labels: list[str]
    lines: list[int]


@dataclass(frozen=True)
class DataSet:
    """A data set, padded with zeros to its longest series; missing values are zeros too.

    Attributes
    ----------
    train, test : (n_series, channels, steps), float32
    train_labels, test_labels : (n_series,), str
    """

    train: NDArray[np.float32]
    test: NDArray[np.float32]
    train_labels: NDArray[np.str_]
    test_labels: NDArray[np.str_]


# ---------------------------------------------------------------- one file


def read_split(path: Path) -> Split:
    """Read a .ts or a relational .arff file.

    Raises
    ------
    UserError
        If the file does not follow its format; names the file and the line.
    """
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if not text.strip():
        raise UserError(f"{path}, line 1: must hold series, got an empty file; unpack again")
    raw_lines = text.splitlines()
    rows = _arff_rows(path, raw_lines) if path.suffix == ".arff" else _ts_rows(path, raw_lines)
    series, labels, lines = [], [], []
    for line, values, label in rows:
        if series and len(values) != len(series[0]):
            raise _line_error(
                path, line, f"dimensions must be {len(series[0])} as in line {lines[0]}",
                str(len(values)),
            )  # fmt: skip
        with np.errstate(over="ignore"):
            if np.isinf(values.astype(np.float32)).any():
                raise _line_error(path, line, "values must be finite", str(np.nanmax(abs(values))))
        series.append(_without_empty_end(values))
        labels.append(label)
        lines.append(line)
    if not series:
        raise UserError(
            f"{path}, line {len(raw_lines)}: @data must be followed by series, got none; "
            "unpack the archive again"
        )
    return Split(path, series, labels, lines)


def _line_error(path: Path, line: int, rule: str, got: str) -> UserError:
    """Make the error of one line of a file."""
    got = got if len(got) <= 60 else got[:57] + "..."
    return UserError(f"{path}, line {line}: {rule}, got {got}; mend the line or unpack again")


def _without_empty_end(series: Series) -> Series:
    """Cut off the last steps that have no value in any channel (.arff pads short series so)."""
    filled = np.flatnonzero(~np.isnan(series).all(0))
    return series[:, : filled[-1] + 1 if len(filled) else 0]


def _ts_rows(path: Path, raw_lines: list[str]) -> Iterator[tuple[int, Series, str]]:
    """Yield line number, series and label of every series of a .ts file."""
    tags: dict[str, str] = {}
    for line, raw in enumerate(raw_lines, start=1):
        content = raw.strip()
        if not content or content.startswith("#"):
            continue
        if "@data" in tags:
            yield _ts_row(path, line, content, tags)
        elif content.startswith("@"):
            tag, _, value = content.partition(" ")
            tags[tag.lower()] = value.strip()
            _check_tag(path, line, tag.lower(), value.strip().lower())
        else:
            raise _line_error(path, line, "@data must stand before the first series", content)
    if "@data" not in tags:
        raise _line_error(path, len(raw_lines), "the header must end with @data", "no @data")


def _check_tag(path: Path, line: int, tag: str, value: str) -> None:
    """Refuse what the header announces and this reader does not read."""
    if tag == "@timestamps" and value == "true":
        raise _line_error(path, line, "@timeStamps must be false", "true")
    if tag == "@classlabel" and value.split()[:1] != ["true"]:
        raise _line_error(path, line, "@classLabel must be true and the labels", value or "nothing")
    if tag == "@dimensions" and not value.isdigit():
        raise _line_error(path, line, "@dimensions must be a whole number", value or "nothing")


def _ts_row(path: Path, line: int, content: str, tags: dict[str, str]) -> tuple[int, Series, str]:
    """Read one series: dimensions separated by colons, the label last."""
    *dimensions, label = content.split(":")
    label = label.strip()
    known = tags.get("@classlabel", "").split()[1:]
    if known and label not in known:
        raise _line_error(path, line, f"the label must be one of {', '.join(known)}", label)
    declared = int(tags.get("@dimensions") or len(dimensions))
    if len(dimensions) != declared or not dimensions:
        raise _line_error(path, line, f"dimensions must be {declared or 1}", str(len(dimensions)))
    rows = [_numbers(path, line, text) for text in dimensions]
    _check_equal_lengths(path, line, [len(row) for row in rows])
    return line, np.array(rows), label


def _numbers(path: Path, line: int, text: str) -> list[float]:
    """Read the values of one dimension; "?" is NaN."""
    numbers = []
    for field in map(str.strip, text.split(",")):
        try:  # Python would read 1_0 as 10
            numbers.append(float("nan" if field == "?" else field.replace("_", "no digit")))
        except ValueError:
            rule = "values must be numbers or ?"
            raise _line_error(path, line, rule, field or "nothing") from None
    return numbers


def _check_equal_lengths(path: Path, line: int, lengths: list[int]) -> None:
    """Refuse a series whose dimensions differ in length."""
    for dimension, length in enumerate(lengths, start=1):
        if length != lengths[0]:
            raise _line_error(
                path, line, f"dimensions must have {lengths[0]} values as the first",
                f"{length} in dimension {dimension}",
            )  # fmt: skip


class _ArffLines:
    """The lines as SciPy's reader takes them, with what it does not tell: numbers and widths."""

    def __init__(self, path: Path, raw_lines: list[str]) -> None:
        self.path, self.raw_lines = path, raw_lines
        self.line = 0
        self.in_data = False
        self.data_lines: list[int] = []
        self.widths: list[int] = []  # values a dimension

    def read(self) -> str:
        """Mark this as an open file: SciPy reads it line by line only."""
        return "\n".join(self.raw_lines)

    def __iter__(self) -> "_ArffLines":
        return self

    def __next__(self) -> str:
        if self.line == len(self.raw_lines):
            raise StopIteration
        raw = self.raw_lines[self.line]
        self.line += 1
        if self.in_data and raw.strip() and not raw.lstrip().startswith("%"):
            dimensions = raw.rpartition(",")[0].strip().strip("'\"").split("\\n")
            # SciPy takes -? and 1_0 for values.
            lengths = [len(_numbers(self.path, self.line, one)) for one in dimensions]
            _check_equal_lengths(self.path, self.line, lengths)
            self.data_lines.append(self.line)
            self.widths.append(lengths[0])
        self.in_data = self.in_data or re.match(r"\s*@data\b", raw, re.IGNORECASE) is not None
        return raw + "\n"


def _arff_rows(path: Path, raw_lines: list[str]) -> Iterator[tuple[int, Series, str]]:
    """Yield line number, series and label of every series of a relational .arff file."""
    source = _ArffLines(path, raw_lines)
    try:
        rows, meta = arff.loadarff(source)
    except StopIteration:
        rule = "the header must end with @data"
        raise _line_error(path, len(raw_lines), rule, "no @data") from None
    except IndexError:  # SciPy found fewer values than attributes
        rule = "a series must have a value for every attribute of the header, and a label"
        raise _line_error(path, source.line, rule, "fewer") from None
    except UserError:
        raise
    except Exception as error:  # ParseArffError, ValueError, csv.Error, NotImplementedError
        rule = "must be relational .arff, numbers or ?, and a declared label"
        raise _line_error(path, source.line, rule, str(error)) from None
    if meta.types() != ["relational", "nominal"]:
        rule = "attributes must be one relational and one of labels"
        raise _line_error(path, source.line, rule, ", ".join(meta.types()))
    for line, width, (table, label) in zip(source.data_lines, source.widths, rows, strict=True):
        n_steps = len(table.dtype.names)
        if width != n_steps:  # SciPy leaves out what is too much
            raise _line_error(path, line, f"dimensions must have {n_steps} values", str(width))
        yield line, np.array(table.tolist(), dtype=np.float64), label.decode()


# ---------------------------------------------------------------- a data set


def load_data_set(
    dataset_dir: Path,
    name: str,
    file_format: str,
    lengths: tuple[int, int] | None,
    min_steps: int = 1,
) -> DataSet:
    """Read both splits of a data set and pad them to the longest series of both.

    Parameters
    ----------
    dataset_dir : Path
        Holds a folder for each data set.
    name : str
        Folder and start of the file names.
    file_format : str
        ts, arff or auto (ts where both are there).
    lengths : (shortest, longest) or None
        Series outside are left out; steps.
    min_steps : int
        The longest series must have so many.

    Raises
    ------
    UserError
        If a file is missing or wrong, or the splits do not fit each other.
    """
    paths = find_files(dataset_dir, name, file_format)
    train, test = (_keep_lengths(read_split(path), lengths) for path in paths)
    _check_splits(train, test)
    n_steps = max(series.shape[1] for split in (train, test) for series in split.series)
    if n_steps < min_steps:
        raise UserError(
            f"series of {train.path} and {test.path.name} must have at least {min_steps} steps, "
            f"got {n_steps} in the longest; leave out this data set"
        )
    return DataSet(
        _padded(train, n_steps), _padded(test, n_steps),
        np.array(train.labels), np.array(test.labels),
    )  # fmt: skip


def find_files(dataset_dir: Path, name: str, file_format: str) -> tuple[Path, Path]:
    """Return the training and the test file of a data set, in one format."""
    cure = f"unpack the archive of {ARCHIVE_PAGE} there, or pass --dataset_dir"
    if not dataset_dir.is_dir():
        raise UserError(f"--dataset_dir must be a folder, got {dataset_dir}; {cure}")
    folder = dataset_dir / name
    if not folder.is_dir():
        found = ", ".join(sorted(path.name for path in dataset_dir.iterdir() if path.is_dir()))
        raise UserError(
            f"--dataset must be a folder of {dataset_dir} (found: {found or 'none'}), got {name}; "
            f"{cure}"
        )
    for suffix in FORMATS if file_format == "auto" else (file_format,):
        train, test = (folder / f"{name}_{split}.{suffix}" for split in ("TRAIN", "TEST"))
        if train.is_file() and test.is_file():
            return train, test
    wanted = "ts or .arff" if file_format == "auto" else file_format
    names = sorted(path.name + " (a folder)" * path.is_dir() for path in folder.iterdir())
    found = ", ".join(names)
    raise UserError(
        f"{folder} must hold {name}_TRAIN.{wanted} and {name}_TEST of the same kind, got "
        f"{found or 'nothing'}; {cure}"
    )


def _keep_lengths(split: Split, lengths: tuple[int, int] | None) -> Split:
    """Leave out the series that are shorter or longer."""
    if lengths is None:
        return split
    shortest, longest = lengths
    kept = [i for i, one in enumerate(split.series) if shortest <= one.shape[1] <= longest]
    if not kept:
        raise UserError(
            f"{split.path} must hold series of {shortest} to {longest} steps, got none; "
            "unpack the archive again"
        )
    return Split(
        split.path, [split.series[i] for i in kept],
        [split.labels[i] for i in kept], [split.lines[i] for i in kept],
    )  # fmt: skip


def _check_splits(train: Split, test: Split) -> None:
    """Refuse splits on which some class cannot be fitted or scored."""
    wanted = len(train.series[0])
    if len(test.series[0]) != wanted:
        rule = f"dimensions must be {wanted} as in {train.path.name}"
        raise _line_error(test.path, test.lines[0], rule, str(len(test.series[0])))
    n_train, n_test = Counter(train.labels), Counter(test.labels)
    for line, label in zip(test.lines, test.labels, strict=True):
        if label not in n_train:
            known = ", ".join(sorted(n_train))
            rule = f"the label must be one of {train.path.name} ({known})"
            raise _line_error(test.path, line, rule, label)
    for line, label in zip(train.lines, train.labels, strict=True):
        if n_train[label] < 2:
            rule = f"class {label} must have at least 2 training series (a covariance needs them)"
            raise _line_error(train.path, line, rule, "1")
        if label not in n_test or len(n_test) < 2:
            rule = f"class {label} and another must be in the test split"
            raise _line_error(test.path, test.lines[-1], rule, ", ".join(sorted(n_test)))


def _padded(split: Split, n_steps: int) -> NDArray[np.float32]:
    """Return (n_series, channels, n_steps) with zeros for padding and missing values."""
    padded = np.zeros((len(split.series), len(split.series[0]), n_steps), dtype=np.float32)
    for target, series in zip(padded, split.series, strict=True):
        target[:, : series.shape[1]] = np.nan_to_num(series)
    return padded
