"""Score the classes of UEA time series, each one as normal in turn: ROC-AUC beside the paper's.

Reads   DATASET_DIR/<name>/<name>_{TRAIN,TEST}.ts (or .arff)   (the UEA archive as unpacked)
Writes  OUT/time_series.csv   one line a data set, class and seed
        OUT/time_series.json  the same with mean, std, published numbers and settings

    python sinbad_time_series.py --dataset_dir ../dataset_uea --dataset all --seeds 0-9

A series is a set of elements: each time step with all dilated windows of all channels around it.
A class is fitted on its training series; the whole test split is scored; the other classes are
the anomalies. One draw of random directions a seed and data set serves all its classes.
Both files are replaced by the next run with the same --out.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional

from command_line import (
    ScriptParser,
    flatten,
    integer_from,
    integer_ranges,
    progress,
    run_script,
    say,
)
from result_files import to_json, write_atomic
from sinbad.backbones import choose_device
from sinbad.report.tables import csv_text, markdown
from sinbad_utils import (
    Scores,
    cumulative_histogram,
    fit_ranges,
    fit_whitening,
    project,
    random_directions,
)
from uea_files import FORMATS, DataSet, find_files, load_data_set

# ROC-AUC in percent; arXiv 2311.14773, requoted by a benchmark site
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
SERIES_A_BATCH = 64  # bounds the memory of the windows; changes no number
# Ledoit and Wolf's shrinkage is 0 for two training series, where no covariance can be inverted.
MIN_SHRINKAGE = 1e-6


@dataclass(frozen=True)
class Result:
    """ROC-AUC of one data set.

    Attributes
    ----------
    name : str
    classes : list of str
    roc_auc : (n_seeds, n_classes), percent
    """

    name: str
    classes: list[str]
    roc_auc: Scores


# ---------------------------------------------------------------- method


def count_dilations(n_steps: int) -> int:
    """Return how many dilations (1, 2, ...) windows of a series of `n_steps` steps have."""
    return min(n_steps // WINDOW, MAX_DILATIONS)


def window_elements(series: Tensor, n_dilations: int) -> Tensor:
    """Turn every time step into one element: the windows around it, all dilations and channels.

    Parameters
    ----------
    series : (n_series, channels, steps)
    n_dilations : int
        Dilations 1 .. n_dilations; zeros stand outside the series.

    Returns
    -------
    (n_series, n_dilations * channels * 9, steps), dilation-major, then channel
    """
    n_steps = series.shape[2]
    windows = []
    for dilation in range(1, n_dilations + 1):
        margin = WINDOW // 2 * dilation
        padded = functional.pad(series, (margin, margin))
        shifted = [padded[:, :, k * dilation : k * dilation + n_steps] for k in range(WINDOW)]
        windows.append(torch.stack(shifted, dim=2))  # (series, channels, window, steps)
    return torch.stack(windows, dim=1).flatten(1, 3)


def project_series(series: Tensor, directions: Tensor, n_dilations: int) -> Tensor:
    """Project the elements of every series; (n_series, n_directions, steps)."""
    return torch.cat(
        [
            project(directions, window_elements(batch, n_dilations))
            for batch in series.split(SERIES_A_BATCH)
        ]
    )


def score_class(normal_values: Tensor, test_values: Tensor, n_quantiles: int) -> Scores:
    """Score test series by the squared Mahalanobis distance to the mean of the normal series.

    Parameters
    ----------
    normal_values : (n_normal, n_directions, steps)
        Projected training series of one class; ranges, mean and covariance see nothing else.
    test_values : (n_test, n_directions, steps)
    n_quantiles : int
        Thresholds a direction.

    Returns
    -------
    (n_test,), float64, higher = more anomalous
    """
    low, high = fit_ranges(normal_values)
    normal = cumulative_histogram(normal_values, low, high, n_quantiles)
    test = cumulative_histogram(test_values, low, high, n_quantiles)
    shrinkage = float(ledoit_wolf_shrinkage(normal.double().cpu().numpy()))
    whitening = fit_whitening(normal, min(max(shrinkage, MIN_SHRINKAGE), 1.0))
    return whitening.squared_distances(test, whitening.mean[None])[:, 0].cpu().numpy()


def score_seed(
    data: DataSet, seed: int, n_projections: int, n_quantiles: int, device: torch.device
) -> list[float]:
    """Return the ROC-AUC of every class (sorted by name), in percent, for one draw of directions.

    Parameters
    ----------
    data : DataSet
    seed : int
        Key of the directions.
    n_projections, n_quantiles : int
        Directions, thresholds a direction.
    device : torch.device
    """
    _, channels, n_steps = data.train.shape
    n_dilations = count_dilations(n_steps)
    n_features = n_dilations * channels * WINDOW
    directions = random_directions(n_projections, n_features, key=(seed,)).to(device)
    train, test = (
        project_series(torch.from_numpy(series).to(device), directions, n_dilations)
        for series in (data.train, data.test)
    )
    roc_auc = []
    for name in np.unique(data.train_labels):
        is_normal = torch.from_numpy(data.train_labels == name).to(device)
        scores = score_class(train[is_normal], test, n_quantiles)
        roc_auc.append(100.0 * float(roc_auc_score(data.test_labels != name, scores)))
    return roc_auc


# ---------------------------------------------------------------- results


def format_table(results: list[Result], n_seeds: int) -> str:
    """Return the Markdown table: classes and mean of every data set, published numbers beside."""
    rows = [["data set", "class", "ours", "std", "published", "difference"]]
    for result in results:
        for name, values in zip(result.classes, result.roc_auc.T, strict=True):
            rows.append([result.name, name, f"{values.mean():.1f}", _std(values), "", ""])
        means = result.roc_auc.mean(1)
        published = PUBLISHED.get(result.name)
        against = ["-", "-"]
        if published is not None:
            against = [f"{published:.1f}", f"{means.mean() - published:+.1f}"]
        rows.append([result.name, "**mean**", f"{means.mean():.1f}", _std(means), *against])
    counted = f"{n_seeds} seeds; std over seeds, n - 1" if n_seeds > 1 else "1 seed"
    return f"{markdown(rows)}\n\nROC-AUC in percent, {counted}."


def _std(values: Scores) -> str:
    """Format the standard deviation over seeds; one seed has none."""
    return f"{values.std(ddof=1):.2f}" if len(values) > 1 else "-"


def save_results(
    out: Path, results: list[Result], seeds: list[int], settings: dict[str, object]
) -> None:
    """Write time_series.csv and time_series.json, each whole or not at all."""
    rows: list[list[object]] = [["dataset", "class", "seed", "roc_auc_percent"]]
    summary = {}
    for result in results:
        for seed, values in zip(seeds, result.roc_auc.tolist(), strict=True):
            named = zip(result.classes, values, strict=True)
            rows.extend([result.name, name, seed, value] for name, value in named)
        means = result.roc_auc.mean(1)
        summary[result.name] = {
            "published": PUBLISHED.get(result.name),
            "mean": float(means.mean()),
            "std": float(means.std(ddof=1)) if len(seeds) > 1 else None,
            "mean_of_each_seed": means.tolist(),
            "classes": dict(zip(result.classes, result.roc_auc.T.tolist(), strict=True)),
        }
    record = {"settings": settings, "unit": "ROC-AUC, percent", "datasets": summary}
    write_atomic(out / "time_series.csv", csv_text(rows).encode())
    write_atomic(out / "time_series.json", (to_json(record) + "\n").encode())


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument(
        "--dataset_dir", type=Path, default=Path("../dataset_uea"),
        help="folder with a folder for each data set",
    )  # fmt: skip
    parser.add_argument(
        "--dataset", nargs="+", required=True, metavar="NAME",
        help=f"all ({', '.join(PUBLISHED)}) or names of folders",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=["auto", *FORMATS], default="auto",
        help="files to read; auto: .ts where both are there",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", nargs="+", type=integer_ranges, default=[[0]],
        help="seeds of the random directions, numbers or ranges like 0-9 (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--n_projections", type=integer_from(1), default=100, help="random directions"
    )
    parser.add_argument(
        "--n_quantiles", type=integer_from(1), default=20, help="thresholds a direction"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("../sinbad_runs/time_series"),
        help="folder of the results",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<i>")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read every data set, score its classes with every seed, save, print the table."""
    args = parse_args(argv)
    device = choose_device(args.device)
    seeds = flatten(args.seeds)
    wanted = list(PUBLISHED) if "all" in args.dataset else list(dict.fromkeys(args.dataset))
    for name in wanted:  # before time goes into the ones that are there
        find_files(args.dataset_dir, name, args.format)
    results = []
    for name in wanted:
        data = load_data_set(
            args.dataset_dir, name, args.format, KEPT_LENGTHS.get(name), min_steps=WINDOW
        )
        classes = np.unique(data.train_labels).tolist()
        say(
            f"{name}: {len(data.train)} training and {len(data.test)} test series of "
            f"{len(classes)} classes, {data.train.shape[1]} channels, {data.train.shape[2]} steps"
        )
        roc_auc = [
            score_seed(data, seed, args.n_projections, args.n_quantiles, device)
            for seed in progress(seeds, desc=name, unit="seed")
        ]
        results.append(Result(name, classes, np.array(roc_auc)))
    settings = {
        "n_projections": args.n_projections, "n_quantiles": args.n_quantiles, "seeds": seeds,
        "window": WINDOW, "max_dilations": MAX_DILATIONS, "device": device.type,
    }  # fmt: skip
    save_results(args.out, results, seeds, settings)
    print(format_table(results, len(seeds)))


if __name__ == "__main__":
    run_script(main)
