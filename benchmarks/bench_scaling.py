"""Time a class of drawn images against its number, and time series against theirs.

Reads   nothing: images and series are drawn
Writes  OUT (CSV): what, number, crop forwards, seconds, the bare network's seconds, peak memory
        WORK/<number>.json of bench_pipeline.py; a run that was killed goes on where it was

    python benchmarks/bench_scaling.py --work ../sinbad_runs/scaling

Everything (levels 7, 14, the raw pixels' 100 repetitions, both data sets of the class) on a CPU,
each size in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sinbad_time_series
from sinbad import atomic, cli, errors, score_plans, uea
from sinbad.report import tables

SERIES_SIZES = (500, 1000, 2000, 4000)  # training series, and as many test series
SERIES_SHAPE = (13, 50)  # channels and steps: SpokenArabicDigits'
CPU = torch.device("cpu")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    add = parser.add_argument
    add("--net", default="resnet18")
    add(
        "--n_images", type=cli.integer_from(8), nargs="+", default=[50, 100, 200], help="of a class"
    )
    add("--work", type=Path, default=Path("../sinbad_runs/scaling"), help="of one machine and code")
    add("--out", type=Path, default=Path("results/scaling.csv"))
    return parser.parse_args(argv)


def time_images(net: str, n_images: int, record: Path) -> list[object]:
    """Return the row of one class, of a process that wrote `record` or has written it before."""
    if not record.exists():
        script = Path(__file__).with_name("bench_pipeline.py")
        words = ["--net", net, "--device", "cpu", "--turns", 1, "--n_images", n_images]
        command = [sys.executable, script, *words, "--out", record]
        subprocess.run(list(map(str, command)), check=True)
    own = json.loads(record.read_text(encoding="utf-8"))["scoring"]
    seconds = [f"{own['seconds']['fp32'][name][0]:.1f}" for name in ("scoring", "bare network")]
    peak = f"{own['peak_memory_bytes']['cpu'] / 1e9:.2f}"
    return [f"images, {net}", own["n_images"], own["crop_forwards"], *seconds, peak]


def time_series(n_series: int) -> list[object]:
    """Return the row of so many series of ten classes, training and test."""
    rng = np.random.default_rng(0)
    train, test = rng.standard_normal((2, n_series, *SERIES_SHAPE), dtype=np.float32)
    labels = (np.arange(n_series) % 10).astype(str)
    data = uea.TimeSeriesDataset(train, test, labels, labels, np.zeros(SERIES_SHAPE[0], np.float32))
    started = time.perf_counter()
    sinbad_time_series.score_seed(data, 0, 100, 20, CPU)
    return ["time series", n_series, "", f"{time.perf_counter() - started:.1f}", "", ""]


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the rows."""
    args = parse_args(argv)
    rows: list[list[object]] = [
        ["what", "number", "crop forwards", "seconds", "seconds, bare network", "peak memory, GB"]
    ]
    rows += [time_images(args.net, n, args.work / f"{n}.json") for n in args.n_images]
    rows += [time_series(n) for n in SERIES_SIZES]
    head = f"# python benchmarks/bench_scaling.py {' '.join(sys.argv[1:])}; "
    atomic.atomic_write(
        args.out, f"{head}{score_plans.made_with(32, CPU)}\n{tables.csv_text(rows)}"
    )
    print(tables.markdown([list(map(str, row)) for row in rows]))


if __name__ == "__main__":
    errors.run_script(main)
