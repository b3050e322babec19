"""Score the classes of UEA time series, each one as normal in turn: ROC-AUC beside the paper's.

Reads   DATASET_DIR/<name>/<name>_{TRAIN,TEST}.ts (or .arff)   (the UEA archive as unpacked)
Writes  OUT/time_series.csv   one line a data set, class and seed
        OUT/time_series.json  the same with mean, std, published numbers and settings

    python sinbad_time_series.py --dataset_dir ../dataset_uea --dataset all --seeds 0-9

A series is a set of elements: each time step with all dilated windows of all channels around it.
A class is fitted on its training series; the whole test split is scored; the other classes are
the anomalies. One draw of random directions a seed and data set serves all its classes.
What OUT holds already is kept and not computed again; --overwrite does.
"""

import argparse
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.metrics import roc_auc_score
from torch import Tensor

import sinbad_utils
from sinbad import atomic, backbones, cli, errors, uea
from sinbad.report import tables

log = logging.getLogger("sinbad")

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

Result = dict[str, Any]  # of a data set in the .json: files, classes, seeds: ROC-AUC of each class


# ---------------------------------------------------------------- method


def count_dilations(n_steps: int) -> int:
    """Return how many dilations (1, 2, ...) windows of a series of `n_steps` steps have."""
    return min(n_steps // WINDOW, MAX_DILATIONS)


def window_elements(series: Tensor, zeros: Tensor, n_dilations: int) -> Tensor:
    """Turn every time step into one element: the windows around it, all dilations and channels.

    Parameters
    ----------
    series : (n_series, channels, steps)
    zeros : (channels,)
        Stand outside the series.
    n_dilations : int
        Dilations 1 .. n_dilations.

    Returns
    -------
    (n_series, n_dilations * channels * 9, steps), dilation-major, then channel
    """
    n_steps = series.shape[2]
    windows = []
    for dilation in range(1, n_dilations + 1):
        margin = WINDOW // 2 * dilation
        edge = zeros[:, None].expand(len(series), -1, margin)
        padded = torch.cat([edge, series, edge], dim=2)
        shifted = [padded[:, :, k * dilation : k * dilation + n_steps] for k in range(WINDOW)]
        windows.append(torch.stack(shifted, dim=2))  # (series, channels, window, steps)
    return torch.stack(windows, dim=1).flatten(1, 3)


def score_class(
    normal_values: Tensor, test_values: Tensor, n_quantiles: int
) -> sinbad_utils.Scores:
    """Score test series by the squared Mahalanobis distance to the mean of the normal series.

    Parameters
    ----------
    normal_values : (n_normal, n_directions, steps)
        Projected training series of one class; ranges, mean and covariance see nothing else.
    test_values : (n_test, n_directions, steps)

    Returns
    -------
    (n_test,), float64, higher = more anomalous
    """
    low, high = sinbad_utils.fit_ranges(normal_values)
    normal = sinbad_utils.cumulative_histogram(normal_values, low, high, n_quantiles)
    test = sinbad_utils.cumulative_histogram(test_values, low, high, n_quantiles)
    shrinkage = float(ledoit_wolf_shrinkage(normal.double().cpu().numpy()))
    whitening = sinbad_utils.fit_whitening(normal, min(max(shrinkage, MIN_SHRINKAGE), 1.0))
    return whitening.squared_norms(test).cpu().numpy()


def score_seed(
    data: uea.DataSet, seed: int, n_projections: int, n_quantiles: int, device: torch.device
) -> list[float]:
    """Return the ROC-AUC in percent of every class, sorted by name, for one draw of directions."""
    _, channels, n_steps = data.train.shape
    n_dilations = count_dilations(n_steps)
    n_features = n_dilations * channels * WINDOW
    directions = sinbad_utils.random_directions(n_projections, n_features, seed_key=(seed,)).to(
        device
    )
    zeros = torch.from_numpy(data.zeros).to(device)
    train, test = (
        torch.cat(
            [
                sinbad_utils.project(directions, window_elements(batch, zeros, n_dilations))
                for batch in torch.from_numpy(series).to(device).split(SERIES_A_BATCH)
            ]
        )
        for series in (data.train, data.test)
    )
    roc_auc = []
    for name in np.unique(data.train_labels):
        is_normal = torch.from_numpy(data.train_labels == name).to(device)
        scores = score_class(train[is_normal], test, n_quantiles)
        roc_auc.append(100.0 * float(roc_auc_score(data.test_labels != name, scores)))
    return roc_auc


# ---------------------------------------------------------------- results


def read_results(
    out: Path, settings: dict[str, int], files: dict[str, dict[str, str]], overwrite: bool
) -> dict[str, Result]:
    """Read what other runs left, which must be of the same settings and files, or is overwritten.

    Parameters
    ----------
    files : data set of this run -> name of a file -> its sha256
    overwrite : leave out the data sets of this run, and all where the settings differ
    """
    path = out / "time_series.json"
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found, there = record["datasets"], {name: record["settings"][name] for name in settings}
    except (ValueError, KeyError, TypeError):
        if overwrite:
            return {}
        rule = f"{path} must be a file of this version, got another"
        raise errors.UserError(f"{rule}; pass --overwrite or another --out") from None
    if overwrite:
        kept = found.keys() - files if there == settings else ()
        return {name: found[name] for name in kept}
    cure = "pass another --out, or --overwrite to lose those"
    for name, value in settings.items():
        if there[name] != value:
            rule = f"{name} must be {there[name]}, that of the results in {path}"
            raise errors.UserError(f"{rule}, got {value}; {cure}")
    for name in files.keys() & found.keys():
        if found[name]["files"] != files[name]:
            rule = f"files must be those of the results of {name} in {path}"
            raise errors.UserError(f"{rule}, got another {' and '.join(files[name])}; {cure}")
    return found


def save_results(out: Path, results: dict[str, Result], settings: dict[str, int]) -> None:
    """Write time_series.csv and time_series.json, each whole or not at all."""
    rows: list[list[object]] = [["dataset", "class", "seed", "roc_auc_percent"]]
    summary: dict[str, Result] = {}
    for name, result in sorted(results.items()):
        seeds = sorted(map(int, result["seeds"]))
        values = _percents(result, seeds)
        for seed, of_seed in zip(seeds, values.tolist(), strict=True):
            named = zip(result["classes"], of_seed, strict=True)
            rows.extend([name, one, seed, value] for one, value in named)
        means = values.mean(1)
        summary[name] = {
            "published": PUBLISHED.get(name),
            "mean": float(means.mean()),
            "std": float(means.std(ddof=1)) if len(seeds) > 1 else None,
            "mean_of_each_seed": means.tolist(),
            "classes": dict(zip(result["classes"], values.T.tolist(), strict=True)),
            "seeds": result["seeds"],
            "files": result["files"],
        }
    record = {"settings": settings, "unit": "ROC-AUC, percent", "datasets": summary}
    atomic.atomic_write(out / "time_series.csv", tables.csv_text(rows))
    atomic.atomic_write(out / "time_series.json", atomic.to_json(record) + "\n")


def format_table(results: dict[str, Result], seeds: list[int]) -> str:
    """Return the Markdown table: classes and mean of every data set, published numbers beside."""
    rows = [["data set", "class", "ours", "std", "published", "difference"]]
    for data_set, result in results.items():
        values = _percents(result, seeds)
        means, published = values.mean(1), PUBLISHED.get(data_set)
        for name, own in [*zip(result["classes"], values.T, strict=True), ("**mean**", means)]:
            std = f"{own.std(ddof=1):.2f}" if len(seeds) > 1 else "-"
            rows.append([data_set, name, f"{own.mean():.1f}", std, "", ""])
        rows[-1][4:] = ["-", "-"]
        if published is not None:
            rows[-1][4:] = [f"{published:.1f}", f"{means.mean() - published:+.1f}"]
    counted = f"{len(seeds)} seeds; std over seeds, n - 1" if len(seeds) > 1 else "1 seed"
    return f"{tables.markdown(rows)}\n\nROC-AUC in percent, {counted}."


def _percents(result: Result, seeds: list[int]) -> sinbad_utils.Scores:
    """Return (n_seeds, n_classes)."""
    return np.array([result["seeds"][str(seed)] for seed in seeds])


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    add = parser.add_argument
    add(
        "--dataset_dir",
        type=Path,
        default=Path("../dataset_uea"),
        help="folder with a folder for each data set",
    )
    add(
        "--dataset",
        nargs="+",
        required=True,
        metavar="NAME",
        help=f"all ({', '.join(PUBLISHED)}) or names of folders",
    )
    add(
        "--format",
        choices=["auto", *uea.FORMATS],
        default="auto",
        help="files to read; auto: .ts where both are there",
    )
    add(
        "--seeds",
        nargs="+",
        type=cli.integer_ranges,
        default=[[0]],
        help="of the random directions, numbers or ranges like 0-9 (default: 0)",
    )
    add("--n_projections", type=cli.integer_from(1), default=100, help="random directions")
    add("--n_quantiles", type=cli.integer_from(1), default=20, help="thresholds a direction")
    add("--out", type=Path, default=Path("../sinbad_runs/time_series"), help="the results' folder")
    add("--overwrite", action="store_true", help="compute again what is there")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<i>")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read every data set, score its classes with every seed, save, print the table."""
    args = parse_args(argv)
    device = backbones.choose_device(args.device)
    settings = {
        "n_projections": args.n_projections,
        "n_quantiles": args.n_quantiles,
        "window": WINDOW,
        "max_dilations": MAX_DILATIONS,
    }
    seeds = cli.flatten(args.seeds)
    wanted = list(PUBLISHED) if "all" in args.dataset else list(dict.fromkeys(args.dataset))
    paths = {name: uea.find_files(args.dataset_dir, name, args.format) for name in wanted}
    files = {
        name: {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths[name]}
        for name in wanted
    }
    results = read_results(args.out, settings, files, args.overwrite)
    for name in wanted:
        data = uea.load_data_set(paths[name], KEPT_LENGTHS.get(name, (0, np.inf)), min_steps=WINDOW)
        classes = np.unique(data.train_labels).tolist()
        log.info(
            f"{name}: {len(data.train)} training and {len(data.test)} test series of "
            f"{len(classes)} classes, {data.train.shape[1]} channels, {data.train.shape[2]} steps"
        )
        result = results.setdefault(name, {"files": files[name], "classes": classes, "seeds": {}})
        missing = [seed for seed in seeds if str(seed) not in result["seeds"]]
        if len(missing) < len(seeds):
            log.info(f"{name}: {len(seeds) - len(missing)} seeds are in {args.out} already")
        if not missing:
            for suffix in ("csv", "json"):
                atomic.remove_hidden(args.out / f"time_series.{suffix}")
        for seed in cli.progress(missing, desc=name, unit="seed"):
            result["seeds"][str(seed)] = score_seed(
                data, seed, args.n_projections, args.n_quantiles, device
            )
            save_results(args.out, results, settings)
    print(format_table({name: results[name] for name in wanted}, seeds))


if __name__ == "__main__":
    errors.run_script(main)
