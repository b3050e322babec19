"""Files of scores before they are computed: what each holds and where it lies.

Standard library only: the array generators import this on login nodes.
"""

import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sinbad import crops, errors, settings


@dataclass(frozen=True)
class ScoreTask:
    """One file of scores: test subset, level, crop grid, seed, repetition and version."""

    mvtype: str
    level: int
    ratio: float
    seed: int
    rep: int
    version: str

    def path(self, results_dir: Path, values: settings.Settings) -> Path:
        """Return the file that the scores are written to."""
        folder = scores_folder(results_dir, self.version, self.level, self.rep, self.mvtype)
        return folder / scores_file_name(self.level, values.grid(self.ratio))


def scores_file_name(level: int, grid: crops.CropGrid) -> str:
    """Return the name of the file with a grid's scores, as the authors' ensemble script expects."""
    if level == settings.PIXEL_LEVEL:
        return f"{grid.side:.2f}_lvl_anom_maps.npz"
    return f"{len(grid)}_crop_anom_maps.npz"


def scores_folder(
    results_dir: Path, version: str, level: int | str, rep: int | str, mvtype: str
) -> Path:
    """Return the folder with the scores of one level, repetition and test subset."""
    return results_dir / f"{version}_pyramid_lvl_{level}" / f"rep_num_{rep}" / mvtype


def check_tasks(tasks: Iterable[ScoreTask], values: settings.Settings) -> None:
    """Stop if two crop ratios of a level would write the same file."""
    ratio_of: dict[tuple[int, str], float] = {}
    for task in tasks:
        name = scores_file_name(task.level, values.grid(task.ratio))
        other = ratio_of.setdefault((task.level, name), task.ratio)
        if other != task.ratio:
            raise errors.UserError(
                f"crop_size_ratio must give files of different names, got {other} and {task.ratio},"
                f" which both write {name} at crop_num_edge {values.crop_num_edge}; run them under "
                "two --version_name"
            )


def check_existing(task: ScoreTask, results_dir: Path, values: settings.Settings) -> None:
    """Stop if a task's output exists with other settings; `values.weights` may be a sha256."""
    path = task.path(results_dir, values)
    if not path.exists():
        return
    try:
        with zipfile.ZipFile(path) as archive:  # of numpy, which is not imported here
            text = archive.read("run.npy").partition(b"\n")[2].decode("utf-32-le")
        record = {"compile": False} | json.loads(text).get("settings", {})
    except KeyError:  # the authors' files have no record
        return
    except (zipfile.BadZipFile, ValueError) as error:
        raise errors.UserError(f"could not read {path}: {error}; remove it") from None
    expected = {"crop_size_ratio": task.ratio, **values.recorded(task.level)}
    if "net" in expected:
        expected |= {"compile": values.compile, "weights_sha256": values.weights}
        if values.weights == "imagenet" and record.get("weights_sha256") != "random":
            del expected["weights_sha256"]  # unknown before it is downloaded
    for name, value in expected.items():
        if record.get(name, value) != value:
            raise errors.UserError(
                f"{path} was computed with {name} {record[name]}, now {name} is {value}; "
                "choose another --version_name or --results_dir, or remove it"
            )
