"""Measure what README and docs state, and write it down: one CSV a table.

Reads   LOCO_DIR/juice_bottle, UEA_DIR/<name>, WEIGHTS_DIR   (what is missing is left out)
Writes  OUT/{time_series,images,ablation,verdicts}.csv, OUT/ablation.png; a run that was killed goes
        on where it was

    python benchmarks/make_results.py --work ../sinbad_runs/measured

Each file's first line tells command, commit, versions, machine and seeds. One class of one data set
shows that the method works as published; it cannot rank methods, and its good test images here are
validation images of the archive.
"""

import argparse
import json
import logging
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL.Image import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data_to_matrices
import reproduce_paper
import sinbad.images
import sinbad_single_layer
import sinbad_time_series
from sinbad import atomic, backbones, cli, detectors, ensembles, errors, score_plans
from sinbad.report import figures, metrics, tables

log = logging.getLogger("sinbad")

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
# One thing of the method at a time, ResNet-18, level 14 alone; the paper's value stands last.
CHANGES = {
    "n_projections": ("10", "100", "3000", "1000"),
    "n_quantiles": ("1", "2", "10", "20", "5"),
    "shrinkage_factor": (".01", ".5", "1", ".1"),
    "crop_size_ratio": (".99", ".7", ".5", ".25", ".25 .5 .7 .99"),
    "training images": ("10", "20", "40", "80"),
}
# Authors' code for time series, unmodified, run on the same files with three seeds, in percent.
AUTHORS = {
    "NATOPS": 96.2,
    "Epilepsy": 99.1,
    "RacketSports": 91.8,
    "CharacterTrajectories": 99.7,
    "SpokenArabicDigits": 97.4,
}
# Of the detector's verdicts: promised rates; pictures fitted on, and that calibrate (0: folds).
RATES = (0.05, 0.1)
SIZES = [(n_train, n_valid) for n_train in (20, 40, 80) for n_valid in (0, 40)]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    add = parser.add_argument
    add("--loco_dir", type=Path, default=SHARED / "data/loco")
    add("--uea_dir", type=Path, default=SHARED / "data/uea")
    add("--weights_dir", type=Path, default=SHARED / "weights")
    add(
        "--seeds",
        nargs="+",
        type=cli.integer_ranges,
        default=[list(range(5))],
        help="of the images",
    )
    add("--n_splits", type=cli.integer_from(1), default=40, help="of the verdicts' pictures")
    add("--device", default="cpu", help="of all but time_series: cpu, cuda or cuda:<i>")
    add("--only", nargs="+", choices=("time_series", "images", "ablation", "verdicts"))
    add(
        "--work",
        type=Path,
        default=Path("../sinbad_runs/measured"),
        help="matrices and scores, of one device and one version of the code",
    )
    add("--out", type=Path, default=Path("results"))
    return parser.parse_args(argv)


def save(args: argparse.Namespace, name: str, seeds: list[int], rows: list[list[object]]) -> None:
    """Write one table, with what it was made by in its first line."""
    device = backbones.choose_device("cpu" if name == "time_series" else args.device)
    made = score_plans.made_with(32, device)
    kept = ("commit", "python", "torch", "torchvision", "numpy", "device")
    about = {key: made[key] for key in kept}
    about |= {"machine": platform.machine(), "cpus": os.cpu_count()}
    head = f"# python benchmarks/make_results.py --only {name}; seeds {seeds}; {about}\n"
    atomic.atomic_write(args.out / f"{name}.csv", head + tables.csv_text(rows))
    log.info(f"written: {args.out / f'{name}.csv'}")


def time_series(args: argparse.Namespace) -> None:
    """Score the five UEA sets with seeds 0 to 9."""
    out = args.work / "time_series"
    sinbad_time_series.main(
        [
            "--dataset_dir",
            str(args.uea_dir),
            "--dataset",
            "all",
            "--seeds",
            "0-9",
            "--out",
            str(out),
        ]
    )
    rows: list[list[object]] = [["data set", "published", "authors' code", "seed", "ROC-AUC, %"]]
    for name in sorted(sinbad_time_series.PUBLISHED):
        result = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        pairs = zip(result["seeds"], result["mean_of_each_seed"], strict=True)
        figures = result["published"], AUTHORS[name]
        rows += [[name, *figures, seed, f"{value:.3f}"] for seed, value in pairs]
    save(args, "time_series", list(range(10)), rows)


def run(
    args: argparse.Namespace,
    net: str,
    version: str,
    flags: tuple[str, ...],
    levels: tuple[str, ...],
) -> list[dict[str, Any]]:
    """Run reproduce_paper.py on juice_bottle; return the metrics of each seed."""
    out = args.work / "reports" / "_".join([version, *flags]).replace("-", "")
    words = ["--dataset_dir", args.loco_dir, "--mvtype", MVTYPE, "--net", net]
    words += ["--device", args.device]
    words += ["--weights", args.weights_dir / NETS[net][0], "--no-figures", "--out", out]
    words += ["--data_dir", args.work / "matrices", "--results_dir", args.work / "scores"]
    words += ["--seeds", *cli.flatten(args.seeds), "--version_name", version, *flags]
    words += ["--pyramid_level", *levels]
    reproduce_paper.main(list(map(str, words)))
    report = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    runs = report.get("runs", {"seed 0": report}).values()
    return [own["data_sets"][MVTYPE] for own in runs]


def images(args: argparse.Namespace) -> None:
    """Score juice_bottle by both networks, in all ways, per level, grid and ensemble."""
    rows: list[list[object]] = [["network", "way", "what", "seed", "ROC-AUC, %"]]
    for net, (_, levels) in NETS.items():
        for way, flags in WAYS.items():
            version = f"{net}_official" if way == "official" else net
            found = run(args, net, version, flags, levels)
            for seed, own in zip(cli.flatten(args.seeds), found, strict=True):
                values = {**own["auroc"], **own["auroc_by_grid"]}
                rows += [[net, way, what, seed, f"{100 * values[what]:.3f}"] for what in values]
    save(args, "images", cli.flatten(args.seeds), rows)


def few_images(args: argparse.Namespace, n_train: int) -> Path:
    """Make matrices of juice_bottle with its first training images only; return their folder."""
    root, source = args.work / f"train_{n_train}", args.loco_dir.resolve() / "juice_bottle"
    target = root / "dataset/juice_bottle"
    if not target.exists():
        with atomic.atomic_path(target) as made:
            (made / "train/good").mkdir(parents=True)
            for part in ("validation", "test"):
                (made / part).symlink_to(source / part)
            for image in sorted((source / "train/good").iterdir())[:n_train]:
                (made / "train/good" / image.name).symlink_to(image)
    data_to_matrices.main(
        [
            "--dataset_dir",
            str(root / "dataset"),
            "--mvtype",
            MVTYPE,
            "--out_dir",
            str(root / "matrices"),
        ]
    )
    return root / "matrices"


def score_changed(args: argparse.Namespace, name: str, value: str) -> dict[str, Any]:
    """Score with one thing changed; return each repetition's ROC-AUC, and the CPU's seconds."""
    version = f"{name}_{value}".replace(" ", "_")
    version = "as_the_paper" if value == CHANGES[name][-1] else version
    results, record = args.work / "ablation", args.work / "ablation" / f"{version}.json"
    if record.exists():
        return json.loads(record.read_text(encoding="utf-8"))
    n_train = int(value) if name == "training images" else 80
    words = ["--mvtype", MVTYPE, "--data_dir", few_images(args, n_train), "--net", "resnet18"]
    words += ["--weights", args.weights_dir / NETS["resnet18"][0], "--pyramid_level", 14]
    words += ["--crop_size_ratio", *CHANGES["crop_size_ratio"][-1].split(), "--rep", "0-4"]
    words += ["--results_dir", results, "--version_name", version, "--overwrite"]
    words += ["--device", args.device]
    if name != "training images":
        words += [f"--{name}", *value.split()]
    started = time.process_time()  # of all threads: other work on the machine changes it little
    sinbad_single_layer.main(list(map(str, words)))
    seconds = time.process_time() - started
    aurocs = []
    for rep in range(5):
        folder = str(results / f"{version}_pyramid_lvl_#")
        scores = ensembles.load_data_set(
            ensembles.EnsembleOptions(folder, folder, (14,), rep, 0, 0.1), MVTYPE
        )
        aurocs.append(100 * metrics.auroc(scores.labels, scores.ensemble))
    found = {"auroc": aurocs, "seconds": seconds}
    atomic.atomic_write(record, atomic.to_json(found))
    return found


def ablation(args: argparse.Namespace) -> None:
    """Change one thing at a time: ResNet-18, level 14, five repetitions (draws of directions)."""
    rows: list[list[object]] = [["changed", "value", "rep", "ROC-AUC, %", "CPU seconds, 5 reps"]]
    for name, values in CHANGES.items():
        for value in sorted(values, key=lambda text: [*map(float, text.split())][::-1]):
            found = score_changed(args, name, value)
            rows += [
                [name, value, rep, f"{own:.3f}", f"{found['seconds']:.0f}"]
                for rep, own in enumerate(found["auroc"])
            ]
    save(args, "ablation", [0], rows)
    atomic.atomic_write(args.out / "ablation.png", figures.png_of(ablation_figure, rows[1:]))


def ablation_figure(rows: list[list[Any]]) -> Figure:
    """Draw a panel for each thing changed: a point a repetition, a line through the medians."""
    figure = Figure((11.0, 3.2))
    panels = figure.subplots(1, len(CHANGES), sharey=True)
    for panel, (name, values) in zip(panels, CHANGES.items(), strict=True):
        own = [row for row in rows if row[0] == name]
        ticks = list(dict.fromkeys((value, seconds) for _, value, _, _, seconds in own))
        of_value = [[float(row[3]) for row in own if row[1] == value] for value, _ in ticks]
        panel.plot([np.median(each) for each in of_value], color="#0072B2")
        for place, each in enumerate(of_value):
            panel.scatter([place] * len(each), each, 14, color="#0072B2", alpha=0.6, linewidths=0)
        names = ["all" if " " in value else value for value, _ in ticks]
        shown = [f"{name}\n{seconds} s" for name, (_, seconds) in zip(names, ticks, strict=True)]
        panel.set_xticks(range(len(ticks)), shown, fontsize=7)
        panel.get_xticklabels()[[value for value, _ in ticks].index(values[-1])].set_weight("bold")
        panel.set_title(name, fontsize=9)
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("ROC-AUC (%)")
    figure.suptitle(
        "juice_bottle (a part), logical; ResNet-18, level 14. A point: a draw of "
        "directions, line: median, bold: the paper's, s: of CPU time",
        x=0.01,
        ha="left",
    )
    return figure


def judge_split(
    good: list[Image],
    bad: list[Image],
    sizes: tuple[int, int],
    seed: int,
    weights: Path,
    device: str,
) -> list[float]:
    """Return, for each rate, the share of good, and of anomalous, pictures called anomalous."""
    order = np.random.default_rng(seed).permutation(len(good))
    train, valid, rest = (
        [good[i] for i in part] for part in np.split(order, [sizes[0], sum(sizes)])
    )
    options = detectors.DetectorOptions(
        "resnet18", str(weights), pyramid_level=(14,), crop_size_ratio=(0.99,), seed=seed
    )
    detector = detectors.Detector.fit(train, valid, options, device)
    scores = np.array([verdict.score for verdict in detector.score(rest + bad, max(RATES))])
    shares = []
    for rate in RATES:
        alarms = scores > detector.threshold(rate)
        shares += [float(alarms[: len(rest)].mean()), float(alarms[len(rest) :].mean())]
    return shares


def verdicts(args: argparse.Namespace) -> None:
    """Compare promised and seen false alarms: the good pictures are split anew each time."""
    folder = args.loco_dir / "juice_bottle"
    parts = [folder / split / "good" for split in ("train", "validation", "test")]
    good = [sinbad.images.open_image(path) for part in parts for path in sorted(part.iterdir())]
    bad = [
        sinbad.images.open_image(path)
        for path in sorted((folder / "test/logical_anomalies").iterdir())
    ]
    weights = args.weights_dir / NETS["resnet18"][0]
    rows: list[list[object]] = [
        [
            "n_train",
            "n_valid",
            "split",
            *(f"{what}_{rate}" for rate in RATES for what in ("false_alarms", "found")),
        ]
    ]
    for sizes in cli.progress(SIZES, "verdicts", "sizes"):
        for seed in range(args.n_splits):
            record = args.work / "verdicts" / f"{sizes[0]}_{sizes[1]}_{seed}.json"
            if not record.exists():
                found = judge_split(good, bad, sizes, seed, weights, args.device)
                atomic.atomic_write(record, atomic.to_json(found))
            rows.append([*sizes, seed, *json.loads(record.read_text(encoding="utf-8"))])
    save(args, "verdicts", list(range(args.n_splits)), rows)


def main(argv: list[str] | None = None) -> None:
    """Measure what there is data for."""
    args = parse_args(argv)
    needs = {time_series: args.uea_dir} | dict.fromkeys((images, ablation, verdicts), args.loco_dir)
    for measure, folder in needs.items():
        if args.only and measure.__name__ not in args.only:
            continue
        if folder.is_dir():
            measure(args)
        else:
            log.info(f"note: {measure.__name__} is left out, there is no {folder}")


if __name__ == "__main__":
    errors.run_script(main)
