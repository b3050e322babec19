"""Runs killed at any moment, runs side by side, a GPU that runs out of memory: the same bytes.

    SINBAD_KILLS=20 python -m pytest tests/test_interruptions.py -k killed_at

kills every script 20 times, 140 times in all.
"""

import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IM_SIZE, files_below
from torch import Tensor, nn

from sinbad import atomic, backbones, errors

KILLED = -9
N_KILLS = int(os.environ.get("SINBAD_KILLS", "2"))  # of each script
SCRIPTS = [
    "data_to_matrices",
    "sinbad_single_layer",
    "calc_anom_ensm",
    "reproduce_paper",
    "sinbad_time_series",
    "sinbad_detector",
    "create_batch_array_sinbad",
]


class Server:
    """Runs scripts as processes (see fork_server.py)."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def run(self, *runs: tuple[str, list[str]], kill_after: float | None = None) -> dict[str, Any]:
        """Run scripts side by side; return exit statuses and seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = json.dumps({"runs": runs, "kill_after": kill_after})
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    here = Path(__file__).parent
    with subprocess.Popen(
        [sys.executable, here / "fork_server.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=here.parent,
        env={"PYTHONPATH": str(here.parent), "PATH": "/usr/bin:/bin"},
    ) as process:
        yield Server(process)
        assert process.stdin is not None
        process.stdin.close()  # it ends with its input


def matrices_argv(dataset_dir: Path, out: Path) -> list[str]:
    flags = ["--im_size", "512", "--num_workers", "2"]
    return ["--dataset_dir", str(dataset_dir), "--out_dir", str(out), *flags]


def paper_argv(dataset_dir: Path, out: Path) -> list[str]:
    return [
        *("--dataset_dir", str(dataset_dir), "--data_dir", str(out / "matrices")),
        *("--results_dir", str(out / "results"), "--out", str(out / "tables")),
        *("--initial_res", str(IM_SIZE), "--device", "cpu", "--no-figures"),
        *("--pyramid_level", "224", "--rep_num_224", "6", "--seeds", "0", "1"),
    ]


def scores_argv(data_dir: Path, results: Path) -> list[str]:
    return [
        *("--data_dir", str(data_dir), "--results_dir", str(results), "--mvtype", "pushpins"),
        *("--initial_res", str(IM_SIZE), "--device", "cpu", "--n_projections", "2"),
        *("--pyramid_level", "224", "--crop_size_ratio", ".999", ".7", "--rep", "0-3"),
    ]


def ensemble_argv(scored: Path, out: Path) -> list[str]:
    version = str(scored / "ver1_pyramid_lvl_#")
    flags = ["--version", version, "--version_224", version, "--mvtype", "pushpins"]
    maps = ["--maps_dir", str(out / "maps"), "--out", str(out / "tables")]
    return [*flags, "--pyramid_level", "14", "--rep_num_224", "0", *maps]


def series_argv(toy: Path, out: Path) -> list[str]:
    flags = ["--n_projections", "20", "--device", "cpu", "--seeds", "0-3"]
    return ["--dataset_dir", str(toy), "--dataset", "Toy", *flags, "--out", str(out)]


def detector_argv(dataset_dir: Path, out: Path) -> list[str]:
    flags = ["--initial_res", str(IM_SIZE), "--device", "cpu", "--pyramid_level", "224"]
    train = ["--train_dir", str(dataset_dir / "pushpins/train/good"), "--rep_num_224", "6"]
    return ["fit", *train, *flags, "--out", str(out / "detector.npz")]


def array_argv(data_dir: Path, out: Path) -> list[str]:
    return ["--data_dir", str(data_dir), "--mvtype", "pushpins", "--out_dir", str(out)]


@pytest.fixture(scope="module")
def inputs(
    server: Server, dataset_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a folder with what the last scripts read: scores of level 14, time series."""
    folder = tmp_path_factory.mktemp("inputs")
    argv = [*scores_argv(data_dir, folder / "scores"), "--net", "resnet18", "--weights", "random"]
    ratio = ["--pyramid_level", "14", "--crop_size_ratio", ".7", "--rep", "0"]
    assert server.run(("sinbad_single_layer", [*argv, *ratio]))["codes"] == [0]
    write_ts(folder / "uea" / "Toy")
    return folder


def argv_of(script: str, dataset_dir: Path, data_dir: Path, inputs: Path, out: Path) -> list[str]:
    """Return the arguments of a script that writes below `out`."""
    return {
        "data_to_matrices": matrices_argv(dataset_dir, out),
        "sinbad_single_layer": scores_argv(data_dir, out),
        "calc_anom_ensm": ensemble_argv(inputs / "scores", out),
        "reproduce_paper": paper_argv(dataset_dir, out),
        "sinbad_time_series": series_argv(inputs / "uea", out),
        "sinbad_detector": detector_argv(dataset_dir, out),
        "create_batch_array_sinbad": array_argv(data_dir, out),
    }[script]


def write_ts(folder: Path) -> None:
    """Write a data set of two classes of sines as .ts."""
    folder.mkdir(parents=True)
    for split, start in (("TRAIN", 0), ("TEST", 1)):
        rows = ["@classLabel true a b", "@data"]
        for number in range(start, start + 8):
            steps = (f"{math.sin((1 + number % 2) * step / 3 + number):.4f}" for step in range(30))
            rows.append(",".join(steps) + f":{'ab'[number % 2]}")
        (folder / f"{folder.name}_{split}.ts").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_killed_at_any_moment_and_started_again_gives_the_same_bytes(
    script: str, server: Server, dataset_dir: Path, data_dir: Path, inputs: Path, tmp_path: Path
) -> None:
    def run(out: Path, kill_after: float | None = None) -> dict[str, Any]:
        argv = argv_of(script, dataset_dir, data_dir, inputs, out)
        return server.run((script, argv), kill_after=kill_after)

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    result = run(undisturbed)
    assert result["codes"] == [0]
    expected = without_folder(files_below(undisturbed), undisturbed)
    moments, longest = random.Random(0), result["seconds"]
    n_killed = 0
    while n_killed < N_KILLS:
        after = moments.uniform(0.02, 1.0) * longest
        if run(killed, kill_after=after)["codes"] == [KILLED]:
            n_killed += 1
            for name, found in without_folder(files_below(killed), killed).items():
                if name == "time_series.csv":  # grows seed by seed
                    assert set(found.splitlines(True)) <= set(expected[name].splitlines(True))
                elif name == "time_series.json":
                    json.loads(found)
                elif ".partial" not in name:  # what is under its name is whole
                    assert found == expected[name]
        else:  # it was faster than the moment: kill earlier
            longest = after
        assert run(killed)["codes"] == [0]
        assert without_folder(files_below(killed), killed) == expected
        shutil.rmtree(killed)


def without_folder(files: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """Replace the folder's own name in texts (a report names its scores' folders)."""
    return {name: data.replace(str(folder).encode(), b"FOLDER") for name, data in files.items()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_writing_the_same_results(
    script: str, server: Server, dataset_dir: Path, data_dir: Path, inputs: Path, tmp_path: Path
) -> None:
    def argv(out: Path) -> list[str]:
        return argv_of(script, dataset_dir, data_dir, inputs, out)

    assert server.run((script, argv(tmp_path / "one")))["codes"] == [0]
    both = (script, argv(tmp_path / "two"))
    assert server.run(both, both)["codes"] == [0, 0]
    assert files_below(tmp_path / "two") == files_below(tmp_path / "one")


DEAD_PROCESS = 2**22 + 1  # above Linux' largest


def left_over(folder: Path, host: str, process: int, age: float = 0.0) -> Path:
    """Make what a killed run leaves in a folder; `age` in seconds."""
    path = folder / f".scores.npz.{host}-{process}-0000dead.partial"
    path.write_bytes(b"half of it")
    made = path.stat().st_mtime - age
    os.utime(path, (made, made))
    return path


def test_what_a_killed_run_left_is_removed_but_not_what_a_living_one_writes(tmp_path: Path) -> None:
    here, day = socket.gethostname(), 24 * 3600.0
    gone = [
        left_over(tmp_path, here, DEAD_PROCESS),
        left_over(tmp_path, "elsewhere", 1, age=day + 60),
        left_over(tmp_path, here, os.getpid(), age=day + 60),
    ]
    kept = [left_over(tmp_path, "elsewhere", 2, age=day - 60), left_over(tmp_path, here, 1)]
    with atomic.atomic_path(tmp_path / "folder") as living:
        living.mkdir()
        (living / "mine").write_bytes(b"whole")
        atomic.atomic_write(tmp_path / "other.txt", "other")
        assert (living / "mine").read_bytes() == b"whole"
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in kept)
    assert (tmp_path / "folder/mine").read_bytes() == b"whole"
    assert (tmp_path / "other.txt").read_text() == "other"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with atomic.atomic_path(tmp_path / "folder") as made:
            made.mkdir()
            (made / content).write_text(content)
    assert files_below(tmp_path) == {"folder/second": b"second"}


def test_unfinished_files_lie_where_no_reader_looks(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    assert atomic.folder_beside(tmp_path / "rep_num_0/pushpins_loco") == tmp_path / "rep_num_0"
    linked = other / f"sinbad-test-{os.getpid()}" / "level"
    linked.mkdir(parents=True)
    try:
        (tmp_path / "level").symlink_to(linked)
        assert atomic.folder_beside(tmp_path / "level") == linked.parent
        atomic.atomic_write(tmp_path / "level/file", "x", atomic.folder_beside(tmp_path / "level"))
        assert (linked / "file").read_text() == "x"
    finally:
        shutil.rmtree(linked.parent)


@pytest.mark.parametrize("script", ["data_to_matrices", "sinbad_single_layer"])
def test_a_run_with_nothing_to_do_sweeps_too(
    script: str, server: Server, dataset_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    argv = (
        ["--dataset_dir", str(dataset_dir), "--out_dir", str(tmp_path), "--im_size", "16"]
        if script == "data_to_matrices"
        else [*scores_argv(data_dir, tmp_path), "--rep", "0", "--crop_size_ratio", ".7"]
    )
    assert server.run((script, argv))["codes"] == [0]
    finished = files_below(tmp_path)
    folder = next(tmp_path.rglob("rep_num_0"), tmp_path)
    left_over(folder, socket.gethostname(), DEAD_PROCESS)
    assert server.run((script, argv))["codes"] == [0]
    assert files_below(tmp_path) == finished


def test_many_runs_may_write_below_one_folder_at_once(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for i in range(30):
            atomic.atomic_write(tmp_path / f"{number}_{i}.txt", b"whole")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert len(files_below(tmp_path)) == 8 * 30


def test_hidden_files_of_others_stay(tmp_path: Path) -> None:
    mine = tmp_path / ".mine.partial"
    mine.touch()
    os.utime(mine, (0, 0))
    atomic.atomic_write(tmp_path / "other.txt", b"other")
    assert mine.exists()


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        atomic.atomic_write(tmp_path / "taken", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# ---------------------------------------------------------------- out of GPU memory


class SmallMemory(nn.Module):
    """A stand-in backbone that holds at most `capacity` crops at once."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.mean, self.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
        self.capacity = capacity
        self.sizes: list[int] = []

    def forward(self, crops: Tensor) -> dict[int, Tensor]:
        """Return the means over 32 x 32 pixels as elements, or run out of memory."""
        self.sizes.append(len(crops))
        if len(crops) > self.capacity:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return {7: nn.functional.avg_pool2d(crops, 32).flatten(2)}


def test_out_of_memory_halves_the_batch_once_and_changes_no_number(
    capsys: pytest.CaptureFixture[str],
) -> None:
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (7, 3, 224, 224), dtype=torch.uint8, generator=generator)
    roomy, tight = SmallMemory(7), SmallMemory(4)
    expected = backbones.FeatureExtractor(roomy, torch.device("cpu")).extract(crops)
    extractor = backbones.FeatureExtractor(tight, torch.device("cpu"))
    for _ in range(2):
        found = extractor.extract(crops)
        assert torch.equal(found[7], expected[7])
    assert tight.sizes == [7, 4, 3, 4, 3]  # stays halved
    assert capsys.readouterr().err.count("GPU memory is too small for 7 crops") == 1


def test_memory_for_no_crop_at_all_is_an_error() -> None:
    extractor = backbones.FeatureExtractor(SmallMemory(0), torch.device("cpu"))
    with pytest.raises(errors.UserError, match="out of GPU memory for a single crop"):
        extractor.extract(torch.zeros(3, 3, 224, 224, dtype=torch.uint8))


def test_a_folder_that_another_process_has_made_meanwhile_stays(tmp_path: Path) -> None:
    with atomic.atomic_path(tmp_path / "folder") as made:
        made.mkdir()
        (made / "ours").write_text("late")
        with atomic.atomic_path(tmp_path / "folder") as theirs:
            theirs.mkdir()
            (theirs / "theirs").write_text("early")
        before = (tmp_path / "folder").stat().st_ino
    assert files_below(tmp_path) == {"folder/theirs": b"early"}
    assert (tmp_path / "folder").stat().st_ino == before
