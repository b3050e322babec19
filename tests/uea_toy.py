"""Small data sets in both formats of the UEA archive, and the script run on them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sinbad_time_series import main

CLASSES = ("up", "down", "flat")
Array = NDArray[np.float64]


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
    main(
        [
            "--dataset_dir",
            str(folder),
            "--dataset",
            "Toy",
            "--out",
            str(out),
            "--n_projections",
            "7",
            "--n_quantiles",
            "4",
            "--device",
            "cpu",
            *flags,
        ]
    )
    return (out / "time_series.csv").read_text()


def replace_in(path: Path, old: str, new: str) -> None:
    """Replace the first occurrence, which must be there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def line_of(path: Path, n: int) -> str:
    """Return line `n` of a file, from 1."""
    return path.read_text().splitlines()[n - 1]
