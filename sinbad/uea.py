"""UEA files (.ts) -> arrays of time series, centred and scaled.

A file that does not follow the format is an error of one line that names the file and the line.
"""

import logging
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sinbad import errors, settings

log = logging.getLogger(__name__)

ARCHIVE_PAGE = "https://www.timeseriesclassification.com"
WHOLE_NUMBERS = ("@dimensions", "@serieslength")  # tags of a header
VALUE = re.compile(rf"{settings.DECIMAL}|NaN|\?")
LARGEST_VALUE = 1e307  # differences of two values stay finite in float64
LARGEST_SCALED = 2.0**100  # sums of projected values stay finite in float32
FAR_FROM_ZERO = 50.0  # times the usual distance of a value to its channel's median

Array = NDArray[np.float64]
Array32 = NDArray[np.float32]
Split = tuple[list[Array], list[str]]  # of each series: values (channels, steps), class label


class TimeSeriesDataset(NamedTuple):
    """A data set, padded to its longest series, in units in which float32 loses nothing.

    Each channel is centred on its median; all are divided by the same power of two.
    """

    train: Array32  # (n_series, channels, steps)
    test: Array32
    train_labels: NDArray[np.str_]  # (n_series,)
    test_labels: NDArray[np.str_]
    padding: Array32  # (channels,), 0 of the files' units: around a series, for a missing value


def find_files(dataset_dir: Path, name: str) -> tuple[Path, Path]:
    """Return the training and the test file of a data set; UserError if one is not found."""
    hint = f"unpack the archive of {ARCHIVE_PAGE} there, or pass --dataset_dir"
    if not dataset_dir.is_dir():
        raise errors.UserError(f"--dataset_dir must be a folder, got {dataset_dir}; {hint}")
    folders = sorted(path.name for path in dataset_dir.iterdir() if path.is_dir())
    if name not in folders:
        rule = f"--dataset must be a folder of {dataset_dir} ({', '.join(folders) or 'none'})"
        raise errors.UserError(f"{rule}, got {name}; {hint}")
    folder = dataset_dir / name
    train, test = folder / f"{name}_TRAIN.ts", folder / f"{name}_TEST.ts"
    if not (train.is_file() and test.is_file()):
        files = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
        rule = f"{folder} must hold the files {train.name} and {test.name}"
        raise errors.UserError(f"{rule}, got {files or 'no file'}; {hint}")
    return train, test


def read_split(path: Path, shortest: float = 0, longest: float = np.inf) -> Split:
    """Read the series of `shortest` to `longest` steps of a .ts file; missing values are NaN.

    Raises
    ------
    UserError
        If the file does not follow the format; names the file and the line.
    """
    text = path.read_text(encoding="utf-8-sig", errors="backslashreplace")
    lines = text.removesuffix("\n").split("\n")  # splitlines would split at \f and U+2028 too
    n_header_lines, classes, n_channels, n_steps = _read_header(path, lines)
    series, labels = [], []
    for line, row in enumerate(lines[n_header_lines:], n_header_lines + 1):
        if not row.strip() or row.lstrip().startswith("#"):
            continue
        content, _, label = row.rpartition(":")
        channels = content.split(":")
        n_channels = len(channels) if n_channels is None else n_channels
        if len(channels) != n_channels:
            rule = f"dimensions must be {n_channels}, as in the header or the line before"
            raise _line_error(path, line, rule, str(len(channels)))
        values, label = _read_values(path, line, channels, n_steps), label.strip()
        if classes and label not in classes:
            raise _line_error(path, line, f"the label must be one of {', '.join(classes)}", label)
        if shortest <= values.shape[1] <= longest:
            series.append(values)
            labels.append(label)
    if not series:
        rule = f"@data must be followed by series of {shortest} to {longest} steps"
        raise _line_error(path, len(lines), rule, "none")
    return series, labels


def _line_error(path: Path, line: int, rule: str, got: str) -> errors.UserError:
    got = got if len(got) <= 60 else got[:57] + "..."
    hint = "fix the line or unpack the archive again"
    return errors.UserError(f"{path}, line {line}: {rule}, got {got or 'nothing'}; {hint}")


def _read_header(path: Path, lines: list[str]) -> tuple[int, list[str], int | None, int | None]:
    """Return its number of lines, and the classes, channels and steps that it declares, if any."""
    tags: dict[str, list[str]] = {}  # of equal tags the last one counts
    for line, row in enumerate(lines, 1):
        tag, *words = row.split() or [""]
        tag, text = tag.lower(), " ".join(words)
        tags[tag] = words
        if tag in WHOLE_NUMBERS and not re.fullmatch("[0-9]{1,9}", text):
            raise _line_error(path, line, f"{tag} must be a whole number", text)
        if tag == "@data":
            break
    else:
        raise _line_error(path, len(lines), "the header must end with @data", lines[-1])
    flags = {tag for tag, words in tags.items() if words[:1] and words[0].lower() == "true"}
    n_channels, n_steps = (int(tags[tag][0]) if tag in tags else None for tag in WHOLE_NUMBERS)
    n_channels = 1 if "@univariate" in flags else n_channels
    n_steps = n_steps if "@equallength" in flags else None
    return line, tags.get("@classlabel", [])[1:], n_channels, n_steps


def _read_values(path: Path, line: int, channels: list[str], n_steps: int | None) -> Array:
    """Read the values of one series, (channels, steps)."""
    rows: list[list[float]] = []
    for text in channels:
        fields = [field.strip() for field in text.split(",")]
        for field in fields:
            if not VALUE.fullmatch(field):
                raise _line_error(path, line, "values must be decimal numbers, ? or NaN", field)
        n_steps = len(fields) if n_steps is None else n_steps
        if len(fields) != n_steps:
            start = f"dimension {len(rows) + 1} must have {n_steps} values"
            rule = f"{start}, as declared or as the first"
            raise _line_error(path, line, rule, str(len(fields)))
        rows.append([float("nan" if field == "?" else field) for field in fields])
    values = np.array(rows)
    if (abs(values) > LARGEST_VALUE).any():
        got = str(np.nanmax(abs(values)))
        raise _line_error(path, line, f"values must be finite (within {LARGEST_VALUE:g})", got)
    return values


def load_time_series(
    paths: tuple[Path, Path], lengths: tuple[float, float] = (0, np.inf), min_steps: int = 1
) -> TimeSeriesDataset:
    """Read the training and the test file of a data set; centre, scale, pad to the longest series.

    Parameters
    ----------
    lengths : shortest and longest series that are kept, in steps
    min_steps : minimum length of the longest series

    Raises
    ------
    UserError
        If a file does not follow the format, or some class cannot be fitted or scored.
    """
    (train, train_labels), (test, test_labels) = (read_split(path, *lengths) for path in paths)
    if len(train[0]) != len(test[0]):
        rule = f"dimensions of {paths[1]} must be {len(train[0])} as in {paths[0].name}"
        raise errors.UserError(f"{rule}, got {len(test[0])}; unpack the archive again")
    _check_labels(paths, train_labels, test_labels)
    n_steps = max(series.shape[1] for series in train + test)
    if n_steps < min_steps:
        rule = f"series of {paths[0]} and {paths[1].name} must have at least {min_steps} steps"
        raise errors.UserError(f"{rule}, got {n_steps} in the longest; leave out this data set")
    centre, exponent = _fit_units(train)
    padding = _pad_and_scale([centre[:, :0]], 1, centre, exponent)[0, :, 0]
    far = abs(padding).max()
    if far > FAR_FROM_ZERO:
        log.warning(
            f"{paths[0]} holds values {far:.0f} times their spread away from 0; padding and "
            "missing values are 0 and may outweigh the series; subtract each channel's mean"
        )
    arrays = (_pad_and_scale(split, n_steps, centre, exponent) for split in (train, test))
    return TimeSeriesDataset(*arrays, np.array(train_labels), np.array(test_labels), padding)


def _check_labels(paths: tuple[Path, Path], train: list[str], test: list[str]) -> None:
    """Raise an error if some class cannot be fitted or scored."""
    counts = Counter(train)
    for label, count in counts.items():
        if count < 2:
            rule = f"class {label} of {paths[0]} must have at least 2 series for a covariance"
            raise errors.UserError(f"{rule}, got 1; leave out this data set")
    if set(counts) != set(test) or len(counts) < 2:
        rule = f"{paths[0]} and {paths[1].name} must hold the same classes, at least 2"
        names, test_names = (", ".join(sorted(set(labels))) for labels in (train, test))
        raise errors.UserError(f"{rule}, got {names} and {test_names}; leave out this data set")


def _pad_and_scale(split: list[Array], n_steps: int, centre: Array, exponent: int) -> Array32:
    """Pad with 0, subtract the centre, divide by 2 ** exponent: (n_series, channels, n_steps)."""
    padded = np.zeros((len(split), len(centre), n_steps))
    for row, values in zip(padded, split, strict=True):
        row[:, : values.shape[1]] = np.nan_to_num(values)
    with np.errstate(over="ignore"):  # what lies far outside is clipped; the rest changes no bit
        scaled = np.ldexp(padded - centre, -exponent)
    return np.float32(scaled.clip(-LARGEST_SCALED, LARGEST_SCALED))


def _fit_units(train: list[Array]) -> tuple[Array, int]:
    """Fit the median of each channel, (channels, 1), and the exponent of the usual distance to it.

    One value of another size would move a mean so far that float64 loses the others.
    """
    pooled = np.concatenate(train, axis=1)  # (channels, steps of all series)
    centre = np.array([[_median(channel)] for channel in pooled])
    distances = abs(pooled - centre)
    usual = max(_median(channel[channel > 0]) for channel in distances)
    return centre, int(np.frexp(usual or abs(centre).max())[1])


def _median(values: Array) -> float:
    """Return the upper median of the values that are not NaN; 0 where there are none."""
    present = np.sort(values[~np.isnan(values)])
    return float(present[len(present) // 2]) if len(present) else 0.0
