"""Small data sets in the format of the UEA archive, and the script run on them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sinbad_time_series import main

CLASSES = ("up", "down", "flat")
HEADER = "# synthetic\n@problemName Toy\n@timeStamps false\n@univariate false\n"
HEADER += f"@dimensions 2\n@classLabel true {' '.join(CLASSES)}\n@data\n"
FIRST_LINE = HEADER.count("\n") + 1  # of the series
Array = NDArray[np.float64]


def make_series(seed: int, n_per_class: int, lengths: tuple[int, int]) -> list[tuple[Array, str]]:
    """Sample series of 2 channels with a trend per class; lengths from .. to, both included."""
    generator = np.random.default_rng(seed)
    series = []
    for label, trend in zip(CLASSES, (1.0, -1.0, 0.0), strict=True):
        for _ in range(n_per_class):
            n_steps = int(generator.integers(lengths[0], lengths[1] + 1))
            noise = generator.normal(size=(2, n_steps))
            series.append((noise + trend * np.linspace(-1, 1, n_steps), label))
    return series


def ts_text(series: list[tuple[Array, str]]) -> str:
    """Return series as the text of a .ts file, NaN as the archive's ?."""
    rows = [
        ":".join([*(",".join(f"{value:.6f}" for value in channel) for channel in values), label])
        for values, label in series
    ]
    return HEADER + "\n".join(rows).replace("nan", "?") + "\n"


def write_toy(
    folder: Path, lengths: tuple[int, int] = (20, 20), name: str = "Toy", missing: bool = False
) -> Path:
    """Write a data set; return the folder of data sets."""
    (folder / name).mkdir(parents=True)
    splits = {"TRAIN": make_series(1, 6, lengths), "TEST": make_series(2, 4, lengths)}
    for split, series in splits.items():
        if missing:
            series[0][0][1, 3:5] = np.nan
        (folder / name / f"{name}_{split}.ts").write_text(ts_text(series))
    return folder


def run(folder: Path, out: Path, *flags: str) -> str:
    """Run the script on the data set Toy, or on those of `flags`; return Toy's CSV."""
    argv = ["--dataset_dir", str(folder), "--out", str(out), "--dataset", "Toy"]
    main([*argv, "--n_projections", "7", "--n_quantiles", "4", "--device", "cpu", *flags])
    csv = out / "Toy.csv"
    return csv.read_text(encoding="utf-8") if csv.exists() else ""
