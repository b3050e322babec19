"""Promised against seen false alarms of the detector, over random splits of one class.

Reads   CLASS_DIR/{train,validation,test}/good and the anomalies of CLASS_DIR/test   (LOCO's layout)
Writes  OUT (CSV), and a table on stdout

    python benchmarks/verdicts.py --class_dir ../dataset_loco/juice_bottle --net resnet18

The good pictures are split anew each time: some are fitted on, some (or none: folds) calibrate, the
rest and the anomalies are judged.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sinbad.detectors import Detector, DetectorOptions
from sinbad.errors import run_script
from sinbad.files import write_whole
from sinbad.flags import ScriptParser, device_flags, integer_from, network_flags, progress
from sinbad.plan import made_with
from sinbad.report.tables import csv_text, markdown

RATES = (0.05, 0.1)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ScriptParser(__doc__, [network_flags(), device_flags()])
    add = parser.add_argument
    add("--class_dir", type=Path, required=True)
    add("--n_train", type=integer_from(4), nargs="+", default=[20, 40, 80])
    add("--n_valid", type=integer_from(0), nargs="+", default=[0, 40], help="0: folds")
    add("--n_splits", type=integer_from(1), default=40)
    add("--pyramid_level", type=integer_from(1), nargs="+", default=[14])
    add("--crop_size_ratio", type=float, nargs="+", default=[0.99])
    add("--initial_res", type=integer_from(8), default=1024)
    add("--out", type=Path, default=Path("verdicts.csv"))
    return parser.parse_args(argv)


def split_once(
    good: list[Image.Image],
    bad: list[Image.Image],
    n_train: int,
    n_valid: int,
    seed: int,
    args: argparse.Namespace,
) -> list[float]:
    """Return, for each rate, the share of good, and of anomalous, pictures called anomalous."""
    order = np.random.default_rng(seed).permutation(len(good))
    train, valid, rest = np.split(order, [n_train, n_train + n_valid])
    options = DetectorOptions(
        net=args.net, weights=args.weights, seed=seed, initial_res=args.initial_res,
        pyramid_level=tuple(args.pyramid_level), crop_size_ratio=tuple(args.crop_size_ratio),
    )  # fmt: skip
    own, calibrate = ([good[i] for i in part] for part in (train, valid))
    detector = Detector.fit(own, calibrate, options, args.device)
    judged = [good[i] for i in rest] + bad
    scores = np.array([verdict.score for verdict in detector.score(judged, max(RATES))])
    shares = []
    for rate in RATES:
        if rate * (len(detector.calibration) + 1) >= 1:
            alarms = scores > detector.threshold(rate)
            shares += [float(alarms[: len(rest)].mean()), float(alarms[len(rest) :].mean())]
        else:
            shares += [float("nan")] * 2
    return shares


def main(argv: list[str] | None = None) -> None:
    """Split, fit, judge, print the table."""
    args = parse_args(argv)
    parts = [args.class_dir / split / "good" for split in ("train", "validation", "test")]
    good = [Image.open(path).convert("RGB") for part in parts for path in sorted(part.iterdir())]
    kinds = [part for part in sorted((args.class_dir / "test").iterdir()) if part.name != "good"]
    bad = [Image.open(path).convert("RGB") for part in kinds for path in sorted(part.iterdir())]
    columns = ["n_train", "n_valid", "split", *(f"{what}_{rate}" for rate in RATES
                                               for what in ("false_alarms", "found"))]  # fmt: skip
    cpu = torch.device("cpu")
    rows: list[list[object]] = [list(columns)]
    head = f"# python benchmarks/verdicts.py {' '.join(sys.argv[1:])}; {made_with(32, cpu)}\n"
    sizes = [(n, m) for n in args.n_train for m in args.n_valid if n + m < len(good)]
    for n_train, n_valid in progress(sizes, "sizes"):
        for seed in range(args.n_splits):
            shares = split_once(good, bad, n_train, n_valid, seed, args)
            rows.append([n_train, n_valid, seed, *shares])
            write_whole(args.out, head + csv_text(rows))
    shown = [["training", "calibration", *(f"{what}, {rate}" for rate in RATES
                                          for what in ("false alarms", "found"))]]  # fmt: skip
    for n_train, n_valid in sizes:
        own = np.array([row[3:] for row in rows[1:] if row[:2] == [n_train, n_valid]], float)
        means = [f"{100 * mean:.1f} %" for mean in own.mean(0)]
        shown.append([str(n_train), str(n_valid or "folds"), *means])
    print(markdown(shown))


if __name__ == "__main__":
    run_script(main)
