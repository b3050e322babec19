"""Score the classes of UEA time series, each in turn as the normal one: ROC-AUC beside the paper's.

Reads   DATASET_DIR/<name>/<name>_{TRAIN,TEST}.ts   (the UEA archive as unpacked)
Writes  OUT/<name>.csv    one row per class and seed
        OUT/<name>.json   the same with mean, std, published number, settings, the files' sha256

    python sinbad_time_series.py --dataset_dir ../dataset_uea --dataset all --seeds 0-9

A series is a set of elements: each time step with all dilated windows of all channels around it.
A class is fitted on its training series, then the whole test split is scored; the other classes are
the anomalies. All classes of a data set share the random directions of a seed.
"""

import argparse
import hashlib
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional

import sinbad_utils
from sinbad import atomic, cli, devices, errors, settings, uea
from sinbad.report import tables

log = logging.getLogger("sinbad")

# ROC-AUC in percent; arXiv 2302.12245, as quoted by a benchmark site
PUBLISHED = {
    "Epilepsy": 98.1,
    "NATOPS": 96.1,
    "CharacterTrajectories": 99.7,
    "RacketSports": 92.3,
    "SpokenArabicDigits": 97.8,
}
KEPT_LENGTHS = {"SpokenArabicDigits": (20, 50)}  # steps; same source
WINDOW = 9  # values of a window; same source
MAX_DILATIONS = 10  # same source
SERIES_PER_BATCH = 64  # bounds the memory of the windows
# Ledoit and Wolf's shrinkage is 0 for two training series, where no covariance can be inverted.
MIN_SHRINKAGE = 1e-6

Result = dict[str, Any]  # a data set's .json


def count_dilations(n_steps: int) -> int:
    """Return how many dilations (1, 2, ...) the windows of a series of `n_steps` steps have."""
    return min(n_steps // WINDOW, MAX_DILATIONS)


def window_elements(series: Tensor, padding: Tensor) -> Tensor:
    """Turn every time step into one element: the windows around it, all dilations and channels.

    Parameters
    ----------
    series : (n_series, channels, steps)
    padding : (channels,)
        The value before and after the series.

    Returns
    -------
    (n_series, n_dilations * channels * 9, steps), dilation-major, then channel
    """
    windows = []
    for dilation in range(1, count_dilations(series.shape[2]) + 1):
        edge = padding[:, None].expand(len(series), -1, WINDOW // 2 * dilation)
        padded = torch.cat([edge, series, edge], dim=2)[:, :, None]  # an image of one row
        windows.append(functional.unfold(padded, (1, WINDOW), dilation=(1, dilation)))
    return torch.cat(windows, dim=1)


def project_series(series: uea.Array32, padding: uea.Array32, directions: Tensor) -> Tensor:
    """Project the elements of series, a batch at a time: (n_series, n_directions, steps)."""
    edge = torch.from_numpy(padding).to(directions)
    values = [
        sinbad_utils.project(directions, window_elements(batch.to(directions), edge))
        for batch in torch.from_numpy(series).split(SERIES_PER_BATCH)
    ]
    return torch.cat(values)


def score_class(normal: Tensor, test: Tensor, n_quantiles: int) -> sinbad_utils.Scores:
    """Score test series by the squared Mahalanobis distance to the mean of the normal series.

    Parameters
    ----------
    normal : (n_normal, n_directions, steps)
        Projected training series of one class; ranges, mean and covariance see nothing else.
    test : (n_test, n_directions, steps)

    Returns
    -------
    (n_test,), float64, higher = more anomalous
    """
    low, high = sinbad_utils.fit_ranges(normal)
    descriptors, test_descriptors = (
        sinbad_utils.cumulative_histogram(values, low, high, n_quantiles)
        for values in (normal, test)
    )
    shrinkage = float(ledoit_wolf_shrinkage(descriptors.double().cpu().numpy()))
    whitening = sinbad_utils.fit_whitening(descriptors, min(max(shrinkage, MIN_SHRINKAGE), 1.0))
    return whitening.squared_norms(test_descriptors).cpu().numpy()


def score_seed(
    data: uea.TimeSeriesDataset,
    seed: int,
    n_projections: int,
    n_quantiles: int,
    device: torch.device,
) -> dict[str, float]:
    """Return the ROC-AUC in percent of every class, with the random directions of a seed."""
    _, channels, n_steps = data.train.shape
    n_features = count_dilations(n_steps) * channels * WINDOW
    directions = sinbad_utils.random_directions(n_projections, n_features, (seed,)).to(device)
    train = project_series(data.train, data.padding, directions)
    test = project_series(data.test, data.padding, directions)
    roc_auc = {}
    for label in np.unique(data.train_labels).tolist():
        is_normal = torch.from_numpy(data.train_labels == label)
        scores = score_class(train[is_normal], test, n_quantiles)
        roc_auc[label] = 100.0 * float(roc_auc_score(data.test_labels != label, scores))
    return roc_auc


def summarise(name: str, roc_auc: dict[int, dict[str, float]]) -> Result:
    """Summarise ROC-AUC, seed -> class -> percent; std is over the seeds' means, n - 1."""
    percents = np.array([list(by_class.values()) for by_class in roc_auc.values()])
    means = percents.mean(1)  # of each seed, over classes
    return {
        "dataset": name,
        "unit": "ROC-AUC, percent",
        "published": PUBLISHED.get(name),
        "mean": float(means.mean()),
        "std": float(means.std(ddof=1)) if len(means) > 1 else None,
        "mean_of_each_seed": means.tolist(),
        "seeds": list(roc_auc),
        "classes": dict(zip(roc_auc[min(roc_auc)], percents.T.tolist(), strict=True)),
    }


def save_result(out: Path, result: Result) -> None:
    """Write the .csv and the .json of a data set, both atomically."""
    name, classes = result["dataset"], result["classes"]
    rows: list[list[object]] = [["dataset", "class", "seed", "roc_auc_percent"]]
    for i, seed in enumerate(result["seeds"]):
        rows += [[name, label, seed, percents[i]] for label, percents in classes.items()]
    atomic.atomic_write(out / f"{name}.csv", tables.csv_text(rows))
    atomic.atomic_write(out / f"{name}.json", atomic.to_json(result) + "\n")


def format_table(results: list[Result]) -> str:
    """Return the Markdown table of results of the same seeds: each class, then the mean."""
    n_seeds = len(results[0]["seeds"])
    rows = [["data set", "class", "ours", "std", "published", "difference"]]
    for result in results:
        lines = {**result["classes"], "**mean**": result["mean_of_each_seed"]}
        for label, percents in lines.items():
            std = f"{np.std(percents, ddof=1):.2f}" if n_seeds > 1 else "-"
            rows.append([result["dataset"], label, f"{np.mean(percents):.1f}", std, "", ""])
        published = result["published"]
        difference = f"{result['mean'] - published:+.1f}" if published else "-"
        rows[-1][4:] = [str(published or "-"), difference]
    counted = f"{n_seeds} seeds; std over seeds, n - 1" if n_seeds > 1 else "1 seed"
    return f"{tables.markdown(rows)}\n\nROC-AUC in percent, {counted}."


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    add = parser.group(settings.INPUT_OUTPUT).add_argument
    about = f"all ({', '.join(PUBLISHED)}) or names of folders"
    add("--dataset", nargs="+", required=True, metavar="NAME", help=about)
    default = Path("../dataset_uea")
    add("--dataset_dir", type=cli.path, default=default, metavar="DIR", help="unpacked archive")
    default = cli.RUNS_DIR / "time_series"
    add("--out", type=cli.path, default=default, metavar="DIR", help="folder of the results")
    add = parser.group(settings.COMPUTED).add_argument
    about = "seeds of the random projections, numbers or ranges like 0-9 (default: 0)"
    add("--seeds", nargs="+", type=cli.integer_ranges, default=[[0]], metavar="N", help=about)
    at_least_1 = cli.int_at_least(1)
    add("--n_projections", type=at_least_1, default=100, metavar="N", help="random projections")
    about = "histogram bins per projection"
    add("--n_quantiles", type=at_least_1, default=20, metavar="N", help=about)
    cli.add_settings(parser, ["device"])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read every data set, score its classes with every seed, save, print the table."""
    args = parse_args(argv)
    device = devices.choose_device(args.device)
    seeds = cli.sorted_unique(args.seeds)
    options = {"n_projections": args.n_projections, "n_quantiles": args.n_quantiles}
    names = itertools.chain(*(PUBLISHED if name == "all" else [name] for name in args.dataset))
    files = {name: uea.find_files(args.dataset_dir, name) for name in names}
    for name, suffix in itertools.product(files, ("csv", "json")):
        atomic.check_writable(args.out / f"{name}.{suffix}")  # an error now, before the work
    results = []
    for name, paths in files.items():
        data = uea.load_time_series(paths, KEPT_LENGTHS.get(name, (0, np.inf)), min_steps=WINDOW)
        _, channels, n_steps = data.train.shape
        log.info(
            f"{name}: {len(data.train)} training and {len(data.test)} test series of "
            f"{len(set(data.train_labels))} classes, {channels} channels, {n_steps} steps"
        )
        bar = cli.progress(seeds, desc=name, unit="seed")
        roc_auc = {seed: score_seed(data, seed, **options, device=device) for seed in bar}
        result = summarise(name, roc_auc)
        result["settings"] = {**options, "window": WINDOW, "max_dilations": MAX_DILATIONS}
        result["files"] = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
        save_result(args.out, result)
        results.append(result)
    print(format_table(results))


if __name__ == "__main__":
    errors.run_script(main)
