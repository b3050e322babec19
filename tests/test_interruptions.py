"""Runs killed at any moment, runs side by side, a GPU that runs out of memory: the same bytes.

    SINBAD_KILLS=20 python -m pytest tests/test_interruptions.py -k killed_at

kills every script 20 times, 140 times in all.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import uea_toy
from conftest import IM_SIZE, files_below
from torch import Tensor, nn

from sinbad import atomic, backbones, errors

ROOT = Path(__file__).parents[1]
KILLED = -9
N_KILLS = int(os.environ.get("SINBAD_KILLS", "2"))  # of each script
SMALL = f"--initial_res {IM_SIZE} --device cpu --pyramid_level 224"
ARGUMENTS = {
    "data_to_matrices": "--dataset_dir {images} --out_dir {out} --im_size 512 --num_workers 2",
    "sinbad_single_layer": "--data_dir {matrices} --results_dir {out} --mvtype pushpins "
    f"{SMALL} --n_projections 2 --crop_size_ratio .999 .7 --rep 0-3",
    "calc_anom_ensm": "--version {inputs}/ver1_pyramid_lvl_# --mvtype pushpins --pyramid_level 14 "
    "--version_224 {inputs}/ver1_pyramid_lvl_# --rep_num_224 0 --maps_dir {out}/maps --out {out}/t",
    "reproduce_paper": "--dataset_dir {images} --data_dir {out}/matrices --results_dir {out}/scores "
    f"--out {{out}}/tables {SMALL} --no-figures --rep_num_224 6 --seeds 0 1",
    "sinbad_time_series": "--dataset_dir {inputs}/uea --dataset Toy --n_projections 20 "
    "--device cpu --seeds 0-3 --out {out}",
    "sinbad_detector": "fit --train_dir {images}/pushpins/train/good --out {out}/detector.npz "
    f"{SMALL} --rep_num_224 6",
    "create_batch_array_sinbad": "--data_dir {matrices} --mvtype pushpins --out_dir {out}",
}
Run = Callable[..., tuple[list[int], float]]


@pytest.fixture(scope="module")
def run(
    dataset_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    """Return a function that runs a script once for each output folder (see fork_server.py)."""
    inputs = tmp_path_factory.mktemp("inputs")  # scores of level 14, time series
    paths = {"images": dataset_dir, "matrices": data_dir, "inputs": inputs}

    def run(script: str, *outs: Path, more: str = "", **kill: Any) -> tuple[list[int], float]:  # noqa: ANN401
        arguments = ARGUMENTS[script] + more
        runs = [(script, arguments.format(out=out, **paths).split()) for out in outs]
        process.stdin.write(json.dumps({"runs": runs, **kill}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    with subprocess.Popen(
        [sys.executable, ROOT / "tests/fork_server.py", *ARGUMENTS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    ) as process:
        level = " --net resnet18 --weights random --pyramid_level 14 --crop_size_ratio .7 --rep 0"
        assert run("sinbad_single_layer", inputs, more=level)[0] == [0]
        uea_toy.write_toy(inputs / "uea")
        yield run
        process.stdin.close()  # it ends with its input


@pytest.mark.parametrize("script", ARGUMENTS)
def test_a_run_killed_at_any_moment_and_started_again_gives_the_same_bytes(
    script: str, run: Run, tmp_path: Path
) -> None:
    """Started again twice at once; and once where another run has finished everything meanwhile."""
    undisturbed, killed, finished = (tmp_path / name for name in ("none", "killed", "finished"))
    codes, longest = run(script, undisturbed)
    assert codes == [0]
    expected = contents(undisturbed)
    moments, n_killed = random.Random(0), 0
    while n_killed < N_KILLS:
        after, at_rename = moments.uniform(0.02, 1.0) * longest, moments.randint(1, 1 + n_killed)
        by_time = n_killed % 2 == 1
        kill = {"kill_after": after} if by_time else {"kill_at_rename": at_rename}
        killed.mkdir()
        if run(script, killed, **kill)[0] == [KILLED]:
            n_killed += 1
            for name, data in contents(killed).items():
                if name == "time_series.csv":  # grows seed by seed
                    assert set(data.splitlines(True)) <= set(expected[name].splitlines(True))
                elif name == "time_series.json":
                    json.loads(data)
                elif ".partial" not in name:  # what is under its name is complete
                    assert data == expected[name]
            assert by_time or list(killed.rglob(".*.partial"))
        elif by_time:  # it was faster than the moment: kill earlier
            longest = after
        shutil.copytree(killed, finished)
        shutil.copytree(undisturbed, finished, dirs_exist_ok=True)
        assert run(script, killed, killed, finished)[0] == [0, 0, 0]
        assert contents(killed) == contents(finished) == expected
        shutil.rmtree(killed)
        shutil.rmtree(finished)


def contents(folder: Path) -> dict[str, bytes]:
    """Return name -> bytes, without the folder's path in texts (a report names its scores')."""
    files = files_below(folder)
    return {name: data.replace(str(folder).encode(), b"FOLDER") for name, data in files.items()}


# ---------------------------------------------------------------- hidden files


def leave_hidden(path: Path, hidden_in: Path | None = None) -> Path:
    """Leave what a killed run leaves of an output."""
    with suppress(KeyboardInterrupt), atomic.atomic_path(path, hidden_in) as hidden:
        raise KeyboardInterrupt
    hidden.write_bytes(b"half of it")
    return hidden


def write(path: Path, content: str, folder: bool) -> None:
    if folder:
        path.mkdir()
    (path / "part" if folder else path).write_text(content)


def test_only_hidden_files_of_the_same_output_are_removed(tmp_path: Path) -> None:
    score_files = [tmp_path / f"pushpins_{kind}/scores.npz" for kind in ("loco", "struct")]
    tables = [tmp_path / name for name in ("a.csv", "a.csv.csv", "a", "[a].csv", "n" * 200)]
    hidden = {path: leave_hidden(path, tmp_path) for path in score_files + tables}
    others = tmp_path / ".other.partial"
    for path in (others, *hidden.values()):
        path.touch()
        os.utime(path, (0, 0))  # ages do not count
    while hidden:
        path, removed = hidden.popitem()
        atomic.atomic_write(path, "complete", tmp_path)
        assert not removed.exists()
        assert all(kept.exists() for kept in (others, *hidden.values()))


@pytest.mark.parametrize("folder", [False, True])
def test_a_slower_run_goes_on_with_the_output_of_a_faster_one(folder: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic.atomic_path(out) as slower:
        write(slower, "slow", folder)
        with atomic.atomic_path(out) as faster:
            write(faster, "fast", folder)
        before = out.stat().st_ino
        assert not slower.exists()
        if folder:
            write(slower / "more", "late", folder)
    assert list(files_below(tmp_path).values()) == [b"fast"]
    assert out.stat().st_ino == before


def test_a_slower_run_without_the_output_is_an_error(tmp_path: Path) -> None:
    missing = tmp_path / "no image"
    (tmp_path / "out").touch()
    for path in (tmp_path / "out", tmp_path / "other"):
        with pytest.raises(FileNotFoundError) as error, atomic.atomic_path(path) as hidden:
            (missing if path.exists() else hidden).read_bytes()
        assert error.value.filename == str(missing if path.exists() else path)


def test_two_containers_of_one_host_name_leave_what_the_other_is_writing(tmp_path: Path) -> None:
    container = ["unshare", "--fork", "--pid"]  # has process numbers of its own
    code = "import sys, pathlib; from sinbad import atomic; "
    code += "atomic.atomic_write(pathlib.Path(sys.argv[1]), 'complete')"
    try:
        subprocess.run([*container, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to make a process namespace (root)")
    with atomic.atomic_path(tmp_path / "out") as living:
        living.write_text("complete")
        for name in ("other", "out"):
            assert living.exists()
            command = [*container, sys.executable, "-c", code, tmp_path / name]
            subprocess.run(command, check=True, cwd=ROOT)
    assert files_below(tmp_path) == {"other": b"complete", "out": b"complete"}


@pytest.mark.parametrize("existed", [False, True])
def test_a_folder_is_replaced_unless_another_process_has_finished_it_meanwhile(
    existed: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for content in ("first", "second") if existed else ():
        with atomic.atomic_path(out) as hidden:
            write(hidden, content, folder=True)
        assert files_below(tmp_path) == {"out/part": content.encode()}
    with atomic.atomic_path(out) as hidden:
        write(hidden, "late", folder=True)
        if existed:
            out.rename(tmp_path / "old")
        write(out, "finished", folder=True)
    assert files_below(out) == {"part": b"finished"}
    assert not list(tmp_path.glob(".*"))


def test_hidden_files_lie_where_no_reader_looks(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    assert atomic.hidden_folder(tmp_path / "rep_num_0/pushpins_loco") == tmp_path / "rep_num_0"
    linked = other / f"sinbad-test-{os.getpid()}" / "level"
    linked.mkdir(parents=True)
    try:
        (tmp_path / "level").symlink_to(linked)
        assert atomic.hidden_folder(tmp_path / "level") == linked.parent
        atomic.atomic_write(tmp_path / "level/file", "x", linked.parent)
        (tmp_path / "link").symlink_to(linked / "file")
        atomic.atomic_write(tmp_path / "link", "y", tmp_path)
        assert files_below(linked.parent) == {"level/file": b"y"}
    finally:
        shutil.rmtree(linked.parent)


def test_many_runs_may_write_below_one_folder_at_once(tmp_path: Path) -> None:
    def write_all(number: int) -> None:
        for i in range(30):
            for name in (f"{number}_{i}.txt", "shared.txt"):
                atomic.atomic_write(tmp_path / name, b"complete")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_all, range(8)))
    files = files_below(tmp_path)
    assert len(files) == 8 * 30 + 1
    assert set(files.values()) == {b"complete"}


# ---------------------------------------------------------------- links, devices, pipes


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_and_its_target_is_replaced(dangling: bool, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    target, link = tmp_path / "data/target.csv", tmp_path / "link.csv"
    link.symlink_to("data/target.csv")
    if not dangling:
        target.write_text("before")
        (tmp_path / "kept").hardlink_to(target)
    atomic.check_writable(link)
    atomic.atomic_write(link, "after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    assert dangling or (tmp_path / "kept").read_text() == "before"  # replaced, not written over


def test_a_device_or_a_pipe_is_written_and_stays(tmp_path: Path) -> None:
    fifo, read = tmp_path / "fifo", []
    os.mkfifo(fifo)
    atomic.check_writable(fifo)  # waits for no reader
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    reader.start()
    atomic.atomic_write(fifo, "data")
    reader.join()
    assert read == [b"data"]
    assert fifo.is_fifo()
    terminal, device = os.openpty()
    atomic.check_writable(Path(os.ttyname(device)))
    atomic.atomic_write(Path(os.ttyname(device)), "data")
    assert os.read(terminal, 100) == b"data"
    with pytest.raises(OSError, match="/dev/full"):
        atomic.atomic_write(Path("/dev/full"), "data")


@pytest.mark.parametrize("redirection", ["> file", "| cat > file", ">> file"])
def test_standard_output_is_written_and_stays(redirection: str, tmp_path: Path) -> None:
    code = "print('before'); out = pathlib.Path('/dev/stdout'); atomic.check_writable(out); "
    code += "atomic.atomic_write(out, 'data\\n'); print('after')"
    command = f'"{sys.executable}" -c "import pathlib; from sinbad import atomic; {code}"'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        f"{command} {redirection}", shell=True, check=True, cwd=tmp_path, env=environment
    )
    assert files_below(tmp_path) == {"file": b"before\ndata\nafter\n"}


def test_an_output_that_cannot_be_written_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    present = sorted(tmp_path.rglob("*"))
    for name, error in (("taken", IsADirectoryError), ("file/x/y", NotADirectoryError)):
        for attempt in (atomic.check_writable, lambda path: atomic.atomic_write(path, b"data")):
            with pytest.raises(error) as caught:
                attempt(tmp_path / name)
            assert str(tmp_path / name).startswith(caught.value.filename)
    for name in ("file", "new", "missing/folders/new"):
        atomic.check_writable(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == present


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
    with pytest.raises(errors.UserError, match="must have memory for one crop"):
        extractor.extract(torch.zeros(3, 3, 224, 224, dtype=torch.uint8))
