"""Measure the numbers of the README and of docs/, one CSV per table.

Reads   LOCO_DIR/juice_bottle, UEA_DIR/<name>; what is missing is skipped
Writes  OUT/{time_series,images,ablation,subsets,verdicts}.csv; intermediate files in WORK

    python benchmarks/make_results.py --only time_series images

One category shows that the method works as published, but cannot rank methods.
"""

import argparse
import functools
import itertools
import json
import logging
import math
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data_to_matrices
import reproduce_paper
import sinbad_time_series
import sinbad_utils
from sinbad import atomic, backbones, cli, detectors, devices, ensembles, errors, images, matrices
from sinbad.image_pool import ImagePool
from sinbad.report import metrics, tables
from sinbad.score_files import environment_info
from sinbad.scoring import CropPosition, CropScorer, GridTask, Repetition, directions_at
from sinbad.settings import Settings
from sinbad_utils import Histograms, Scores

log = logging.getLogger("sinbad")

CATEGORY, MVTYPE = "juice_bottle", "juice_bottle_loco"
# Network -> file of ImageNet weights in --weights_dir, levels.
NETS = {"resnet18": ("resnet18_imagenet_to_layer3.pth", (14, 224))}
NETS["tf_efficientnet_lite0"] = ("tf_efficientnet_lite0.safetensors", (7, 14, 28, 224))
NETS["tf_efficientnet_lite2"] = ("tf_efficientnet_lite2.pth", (7, 14, 28, 224))
WAYS = {
    "ours": "",
    "official": "--official",
    "crop_norm crop": "--crop_norm crop",
    "crop_pool max": "--crop_pool max",
    "both": "--crop_norm crop --crop_pool max",
}
# One setting at a time; ResNet-18, level 14 alone, else 80 training images.
CHANGES = {
    "n_projections": "10;100;1000;3000",
    "n_quantiles": "1;2;5;10;20",
    "shrinkage_factor": ".01;.1;.5;1",
    "crop_size_ratio": ".25;.5;.7;.99;.25 .5 .7 .99",
    "training images": "4;8;10;20;40;80",
}
# Authors' code for time series, unmodified, run on the same files with three seeds, in percent.
AUTHORS = {"CharacterTrajectories": 99.7, "Epilepsy": 99.1, "NATOPS": 96.2, "RacketSports": 91.8}
AUTHORS["SpokenArabicDigits"] = 97.4
RATES = (0.05, 0.1)  # nominal false-positive rates of the verdicts
SUBSET_SIZES = (4, 8, 10, 20, 40)
# Training images and calibration set of the verdicts; 0: the training images in folds.
SIZES = [(20, 0), (20, 20), (20, 40), (40, 0), (40, 20), (40, 40), (60, 40), (80, 0), (80, 40)]


def weights_of(args: argparse.Namespace, net: str) -> str:
    """Return the value of --weights for a network."""
    return str(args.weights_dir / NETS[net][0]) if args.weights_dir else "imagenet"


def measure_time_series(args: argparse.Namespace) -> list[list[Any]]:
    """Score the UEA data sets that are present with every seed."""
    rows: list[list[Any]] = [["data set", "published", "authors' code", "seed", "ROC-AUC, %"]]
    for name, authors in AUTHORS.items():
        if not (args.uea_dir / name).is_dir():
            log.info(f"{name} skipped: no folder {args.uea_dir / name}")
            continue
        words = ["--dataset_dir", args.uea_dir, "--dataset", name, "--out", args.work]
        words += ["--seeds", "0-9", "--device", args.device]
        sinbad_time_series.main(list(map(str, words)))
        result = json.loads((args.work / f"{name}.json").read_text(encoding="utf-8"))
        means = enumerate(result["mean_of_each_seed"])
        rows += [[name, result["published"], authors, seed, f"{m:.3f}"] for seed, m in means]
    return rows


def measure_images(args: argparse.Namespace) -> list[list[Any]]:
    """Score the category by both networks, in all ways; per level, grid and ensemble."""
    rows: list[list[Any]] = [["network", "way", "what", "seed", "ROC-AUC, %"]]
    seeds, out = cli.sorted_unique(args.seeds), args.work / "report"
    for (net, (_, levels)), (way, flags) in itertools.product(NETS.items(), WAYS.items()):
        version = f"{net}_official" if way == "official" else net
        words = ["--dataset_dir", args.loco_dir, "--mvtype", MVTYPE, "--version_name", version]
        words += ["--data_dir", args.work, "--results_dir", args.work / "scores", "--out", out]
        words += ["--net", net, "--weights", weights_of(args, net), "--device", args.device]
        words += ["--no-figures", "--pyramid_level", *levels, "--seeds", *seeds, *flags.split()]
        reproduce_paper.main(list(map(str, words)))
        report = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        runs = report.get("runs", {f"seed {seeds[0]}": report})
        for seed in seeds:
            results = runs[f"seed {seed}"]["data_sets"][MVTYPE]
            aurocs = {**results["auroc"], **results["auroc_by_grid"]}
            rows += [[net, way, what, seed, f"{100 * a:.3f}"] for what, a in aurocs.items()]
    return rows


def load_category(
    args: argparse.Namespace,
) -> tuple[
    matrices.MatrixSet,
    ImagePool,
    dict[tuple[str, str], list[int]],
    backbones.FeatureExtractor,
]:
    """Preprocess the category; return it, its images, their numbers, and ResNet-18, level 14."""
    data_to_matrices.make_matrices(args.loco_dir, args.work, [MVTYPE])
    subset, device = matrices.load_matrices(args.work, MVTYPE), devices.choose_device(args.device)
    pool, ids = matrices.pool_subsets([subset], device, Settings().n_workers)
    weights = backbones.load_weights("resnet18", weights_of(args, "resnet18"))
    backbone = backbones.build_backbone("resnet18", weights, (14,))
    return subset, pool, ids, backbones.FeatureExtractor(backbone, device)


def measure_ablation(args: argparse.Namespace) -> list[list[Any]]:
    """Change one setting at a time; five repetitions of the random projections."""
    subset, pool, ids, extractor = load_category(args)
    train, valid, test = (ids[MVTYPE, split] for split in ("train", "valid", "test"))

    @functools.cache  # the paper's settings are those of one row of every setting
    def measure(values: Settings, n_train: int) -> tuple[list[float], str]:
        repetitions = [Repetition(14, 0, rep) for rep in range(5)]
        tasks = [GridTask(ratio, p) for ratio in values.crop_size_ratio for p in repetitions]
        scorer = CropScorer(pool, values, extractor, CATEGORY)
        scores = defaultdict(list)
        started = time.process_time()  # of all threads: other work on the machine changes it little
        for (_, repetition), arrays in scorer.score_grids(tasks, train[:n_train], [test, valid]):
            scores[repetition].append(ensembles.CropScores(14, *arrays))
        seconds = time.process_time() - started
        finals = [ensembles.combine(crop_scores, values).final for crop_scores in scores.values()]
        return [100 * metrics.auroc(subset.labels, final) for final in finals], f"{seconds:.0f}"

    rows: list[list[Any]] = [["changed", "value", "rep", "ROC-AUC, %", "CPU seconds, 5 reps"]]
    for name, texts in CHANGES.items():
        for text in texts.split(";"):
            is_size = name == "training images"
            change = {} if is_size else {name: text.split() if name == "crop_size_ratio" else text}
            aurocs, seconds = measure(Settings(**change), int(text) if is_size else 80)
            rows += [[name, text, rep, f"{a:.3f}", seconds] for rep, a in enumerate(aurocs)]
    return rows


def measure_subsets(args: argparse.Namespace) -> list[list[Any]]:
    """Train on random subsets of the training images; level 14, one crop, as the verdicts."""
    subset, pool, ids, extractor = load_category(args)
    values = Settings((14,), (0.99,), net="resnet18", device=args.device)
    elements = one_crop_elements(pool, extractor, values)
    rows: list[list[Any]] = [["n_train", "subset", "ROC-AUC, %"]]
    for number in cli.progress(range(args.n_subsets), "subsets", "subsets"):
        order = np.random.default_rng(number).permutation(ids[MVTYPE, "train"])
        for n_train in SUBSET_SIZES:
            n_range_sets = min(n_train, sinbad_utils.N_RANGE_SETS)
            model = describe_all(elements, order, number, values, n_range_sets)
            settings = replace(values, seed=number), subset.settings
            _, scores = fit_verdicts(*model, order[:n_train], order[:0], *settings)
            auroc = 100 * metrics.auroc(subset.labels, scores[ids[MVTYPE, "test"]])
            rows.append([n_train, number, f"{auroc:.3f}"])
    return rows


def measure_verdicts(args: argparse.Namespace) -> list[list[Any]]:
    """Count false positives over random splits of the normal images; level 14, one crop."""
    subset, pool, ids, extractor = load_category(args)
    normal = [i for split in ("train", "valid", "test") for i in ids[MVTYPE, split]]
    anomalous = [i for i, label in zip(ids[MVTYPE, "test"], subset.labels, strict=True) if label]
    normal = sorted(set(normal) - set(anomalous))
    values = Settings((14,), (0.99,), net="resnet18", device=args.device)
    elements = one_crop_elements(pool, extractor, values)
    columns = [f"{what}_{rate}" for rate in RATES for what in ("false_alarms", "found")]
    rows: list[list[Any]] = [["n_train", "n_valid", "split", "n_normal", *columns]]
    for split in cli.progress(range(args.n_splits), "verdicts", "splits"):
        order = np.random.default_rng(split).permutation(normal)
        describe = functools.cache(functools.partial(describe_all, elements, order, split, values))
        for n_train, n_valid in SIZES:
            _, valid, rest = np.split(order, [n_train, n_train + n_valid])
            model = describe(min(n_train, sinbad_utils.N_RANGE_SETS))
            detector, scores = fit_verdicts(
                *model, order[:n_train], valid, replace(values, seed=split), subset.settings
            )
            counts = [
                int((scores[part] > detector.threshold(rate)).sum())
                for rate in RATES
                for part in (rest, anomalous)
            ]
            rows.append([n_train, n_valid, split, len(rest), *counts])
    return rows


def one_crop_elements(
    pool: ImagePool, extractor: backbones.FeatureExtractor, values: Settings
) -> Tensor:
    """Run the network once over the first crop of every image: (n, channels, n_elements)."""
    grid = values.grid(values.crop_size_ratio[0])
    source = images.nearest_source(grid.side, backbones.INPUT_SIDE)
    parts = []
    for ids in np.array_split(np.arange(len(pool)), math.ceil(len(pool) / 32)):
        pixels = pool.gather([(ids.tolist(), grid.corners[0], source)]).to(pool.device)
        parts.append(extractor.extract(pixels)[values.pyramid_level[0]])
    return torch.cat(parts)


def describe_all(
    elements: Tensor, order: NDArray[np.int64], seed: int, values: Settings, n_range_sets: int
) -> tuple[Histograms, Tensor]:
    """Fit the ranges on the first images of `order`; describe all of them, (n, length)."""
    (level,), grid = values.pyramid_level, values.grid(values.crop_size_ratio[0])
    repetition = Repetition(level, seed, 0)
    position = CropPosition(grid, 0, grid.corners[0], (repetition,))
    directions = directions_at(position, repetition, elements.shape[1], values)
    histograms = sinbad_utils.fit_histograms(
        directions.to(elements.device), elements[order[:n_range_sets]], values.n_quantiles
    )
    return histograms, histograms.describe(elements)


def fit_verdicts(
    histograms: Histograms,
    descriptors: Tensor,
    train: NDArray[np.int64],
    valid: NDArray[np.int64],
    values: Settings,
    resizing: dict[str, Any],
) -> tuple[detectors.Detector, Scores]:
    """Fit a detector on images that are described already; it, and the scores of all of them.

    `valid` is the calibration set; if it is empty, the training images are scored in folds.
    """
    (level,), shrinkage = values.pyramid_level, values.at_level(14).shrinkage_factor
    model = sinbad_utils.fit_crop_model(histograms, descriptors[train], shrinkage)
    crop_scores = model.neighbours.nearest(descriptors).cpu().numpy()
    calibration = crop_scores[valid]
    if not len(valid):
        folds = detectors.Folds(np.arange(len(train)), values.folds, values.seed)
        calibration = folds.score(model.train_descriptors, shrinkage)
    calibration_crops = {(level, 1): calibration[None, None]}
    detector = detectors.Detector(values, {"matrices": resizing}, {}, calibration_crops, None)
    grid = ensembles.CropScores(level, crop_scores[None], calibration[None])
    return detector, ensembles.combine([grid], values).final


MEASUREMENTS = {
    "time_series": measure_time_series,
    "images": measure_images,
    "ablation": measure_ablation,
    "subsets": measure_subsets,
    "verdicts": measure_verdicts,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), help="tables")
    add("--loco_dir", type=cli.path, default=cli.DATASET_DIR, help="MVTec LOCO AD")
    add("--uea_dir", type=cli.path, default=Path("../dataset_uea"), help="UEA archive")
    add("--weights_dir", type=cli.path, help="folder of weights files (default: downloaded)")
    add("--seeds", nargs="+", type=cli.integer_ranges, default=[range(5)], help="of images")
    add("--n_subsets", type=cli.int_at_least(1), default=50, help="of training images")
    add("--n_splits", type=cli.int_at_least(1), default=300, help="of verdicts")
    add("--work", type=cli.path, default=cli.RUNS_DIR / "measured", help="preprocessed images")
    add("--out", type=cli.path, default=Path("results"), help="folder of the tables")
    cli.add_settings(parser, ["device"], device="cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure what there is data for."""
    args = parse_args(argv)
    for name in args.only:
        folder = args.uea_dir if name == "time_series" else args.loco_dir / CATEGORY
        if not folder.is_dir():
            log.info(f"{name} skipped: no folder {folder}")
            continue
        rows = MEASUREMENTS[name](args)
        about = environment_info(32, devices.choose_device(args.device))
        head = f"# python benchmarks/make_results.py --only {name}; {about}\n"
        atomic.atomic_write(args.out / f"{name}.csv", head + tables.csv_text(rows))


if __name__ == "__main__":
    errors.run_script(main)
