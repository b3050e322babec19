"""Measure what README and docs state, and write it down: one CSV a table.

Reads   LOCO_DIR/juice_bottle, UEA_DIR/<name>, WEIGHTS_DIR   (what is missing is left out)
Writes  OUT/{time_series,images,ablation}.csv; a run that was killed goes on where it was

    python benchmarks/make_results.py --work ../sinbad_runs/measured

Each file's first line tells command, commit, versions, machine and seeds. One class of one data set
shows that the method works as published; it cannot rank methods, and its good test images here are
validation images of the archive.
"""

import argparse
import csv
import io
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import reproduce_paper
import sinbad_time_series
from sinbad.errors import run_script, say
from sinbad.files import write_whole
from sinbad.flags import ScriptParser, flatten, integer_ranges
from sinbad.plan import made_with

SHARED = Path("../shared")
MVTYPE = "juice_bottle_loco"
NETS = {
    "resnet18": ("resnet18_imagenet_to_layer3.pth", ("14", "224")),
    "tf_efficientnet_lite0": ("tf_efficientnet_lite0.safetensors", ("7", "14", "28", "224")),
}
WAYS = {
    "ours": (),
    "official": ("--official",),
    "crop_norm crop": ("--crop_norm", "crop"),
    "crop_pool max": ("--crop_pool", "max"),
    "both": ("--crop_norm", "crop", "--crop_pool", "max"),
}
# One thing of the method at a time, ResNet-18, level 14 alone.
CHANGES = {
    "n_projections": ("10", "100", "1000", "3000"),
    "n_quantiles": ("1", "2", "5", "10", "20"),
    "shrinkage_factor": (".01", ".1", ".5", "1"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ScriptParser(__doc__)
    add = parser.add_argument
    add("--loco_dir", type=Path, default=SHARED / "data/loco")
    add("--uea_dir", type=Path, default=SHARED / "data/uea")
    add("--weights_dir", type=Path, default=SHARED / "weights")
    add("--seeds", nargs="+", type=integer_ranges, default=[list(range(5))], help="of the images")
    add("--only", nargs="+", choices=("time_series", "images", "ablation"))
    add("--work", type=Path, default=Path("../sinbad_runs/measured"), help="matrices and scores")
    add("--out", type=Path, default=Path("results"))
    return parser.parse_args(argv)


def save(args: argparse.Namespace, name: str, seeds: list[int], rows: list[list[object]]) -> None:
    """Write one table, with what it was made by in its first line."""
    made = made_with(32, torch.device("cpu"))
    about = {key: made[key] for key in ("commit", "python", "torch", "torchvision", "numpy")}
    about |= {"machine": platform.machine(), "cpus": os.cpu_count()}
    text = io.StringIO()
    text.write(f"# python benchmarks/make_results.py --only {name}; seeds {seeds}; {about}\n")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_whole(args.out / f"{name}.csv", text.getvalue())
    say(f"written: {args.out / f'{name}.csv'}")


def time_series(args: argparse.Namespace) -> None:
    """Score the five UEA sets with seeds 0 to 9."""
    out = args.work / "time_series"
    sinbad_time_series.main(["--dataset_dir", str(args.uea_dir), "--dataset", "all", "--seeds",
                             "0-9", "--out", str(out)])  # fmt: skip
    found = json.loads((out / "time_series.json").read_text(encoding="utf-8"))["datasets"]
    rows: list[list[object]] = [["data set", "published", "seed", "ROC-AUC, %"]]
    for name, own in sorted(found.items()):
        pairs = zip(own["seeds"], own["mean_of_each_seed"], strict=True)
        rows += [[name, own["published"], seed, f"{value:.3f}"] for seed, value in pairs]
    save(args, "time_series", list(range(10)), rows)


def run(
    args: argparse.Namespace,
    net: str,
    version: str,
    flags: tuple[str, ...],
    levels: tuple[str, ...],
) -> tuple[list[dict[str, Any]], float]:
    """Run reproduce_paper.py on juice_bottle; return the metrics of each seed, and the seconds."""
    out = args.work / "reports" / "_".join([version, *flags]).replace("-", "")
    words = ["--dataset_dir", args.loco_dir, "--mvtype", MVTYPE, "--net", net, "--device", "cpu"]
    words += ["--weights", args.weights_dir / NETS[net][0], "--no-figures", "--out", out]
    words += ["--data_dir", args.work / "matrices", "--results_dir", args.work / "scores"]
    words += ["--seeds", *flatten(args.seeds), "--version_name", version, *flags]
    words += ["--pyramid_level", *levels]
    started = time.perf_counter()
    reproduce_paper.main(list(map(str, words)))
    seconds = time.perf_counter() - started
    report = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    runs = report.get("runs", {"seed 0": report}).values()
    return [own["data_sets"][MVTYPE] for own in runs], seconds


def images(args: argparse.Namespace) -> None:
    """Score juice_bottle by both networks, in all ways, per level, grid and ensemble."""
    rows: list[list[object]] = [["network", "way", "what", "seed", "ROC-AUC, %"]]
    for net, (_, levels) in NETS.items():
        for way, flags in WAYS.items():
            version = f"{net}_official" if way == "official" else net
            for seed, own in zip(flatten(args.seeds), run(args, net, version, flags, levels)[0],
                                 strict=True):  # fmt: skip
                values = {**own["auroc"], **own["auroc_by_grid"]}
                rows += [[net, way, what, seed, f"{100 * values[what]:.3f}"] for what in values]
    save(args, "images", flatten(args.seeds), rows)


def ablation(args: argparse.Namespace) -> None:
    """Change one thing at a time: ResNet-18, level 14, four grids."""
    rows: list[list[object]] = [["changed", "value", "seed", "ROC-AUC, %", "seconds a seed"]]
    for name, values in CHANGES.items():
        for value in values:
            version = f"resnet18_{name}_{value}"
            found, seconds = run(args, "resnet18", version, (f"--{name}", value), ("14",))
            seeds = flatten(args.seeds)
            rows += [[name, value, seed, f"{100 * own['auroc']['ensemble']:.3f}",
                      f"{seconds / len(seeds):.1f}"]
                     for seed, own in zip(seeds, found, strict=True)]  # fmt: skip
    save(args, "ablation", flatten(args.seeds), rows)


def main(argv: list[str] | None = None) -> None:
    """Measure what there is data for."""
    args = parse_args(argv)
    needs = {time_series: args.uea_dir, images: args.loco_dir, ablation: args.loco_dir}
    for measure, folder in needs.items():
        if args.only and measure.__name__ not in args.only:
            continue
        if folder.is_dir():
            measure(args)
        else:
            say(f"note: {measure.__name__} is left out, there is no {folder}")


if __name__ == "__main__":
    run_script(main)
