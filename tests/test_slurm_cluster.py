"""The array generators on a real one-node Slurm; skipped, with the reason, where there is none."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import slurm_stub as stub
import torch
from conftest import files_below
from slurm_cluster import drained_node, end_jobs, job_listing, running_cluster, set_node

import create_batch_array_sinbad as backbone
import create_batch_array_sinbad_224 as pixels
import sinbad_single_layer
from sinbad import slurm

REPO = Path(__file__).resolve().parent.parent

# The first four tasks hang, but not when they are submitted again.
HANG_ONCE = '[ $SLURM_ARRAY_TASK_ID -ge 4 ] || [ -n "$STUB_AGAIN" ] || export STUB_SECONDS=300'


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Run a Slurm of one node."""
    folder_context = tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp")
    with folder_context as folder, running_cluster(Path(folder)):
        yield


@pytest.fixture(autouse=True)
def no_jobs_left(cluster: None) -> Iterator[None]:
    """Cancel what a test leaves."""
    yield
    end_jobs()


def wait_for_the_end(event: str) -> None:
    """Wait until Slurm has no jobs left."""
    stub.wait_until(lambda: not job_listing(), event)


@pytest.mark.parametrize("missing", [range(0, 43, 4), [i for i in range(43) if i % 3 != 2]])
def test_killed_after_sbatch_nothing_is_submitted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: Sequence[int]
) -> None:
    folder = stub.generate(tmp_path, 43, 0, "--throttle", "3")
    for task in set(range(43)) - set(missing):
        (path,) = map(Path, slurm.read_outputs(folder / "tasks.tsv")[task])
        path.parent.mkdir(parents=True)
        path.touch()
    wrapper = tmp_path / "sbatch"
    wrapper.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@"\nkill -9 $PPID\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("SQUEUE_ARRAY", "1")
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    with drained_node(cancel=True):
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
            assert stub.batch_master(folder).returncode == -9
        assert stub.batch_master(folder).stdout == ""
        assert "missing" not in stub.states(folder)
        assert stub.states(stub.generate(tmp_path / "b", 43, 0)) == {"missing": "0-42"}
        job = job_listing()[0].partition("_")[0]
        slurm.ask_slurm("scancel", f"{job}_[4,12,16]")
        assert stub.states(folder)["missing"] == "4,12,16"
        again = stub.batch_master(folder)
        assert "submitted --array=4,12,16%3" in again.stderr
        assert again.stdout.strip() not in ("", job)
    wait_for_the_end("the cancelled jobs")


def test_two_submissions_at_the_same_moment_cost_work_alone(tmp_path: Path) -> None:
    folder = stub.generate(tmp_path / "it's mine", 3, 0)
    with drained_node(cancel=False):
        runs = [subprocess.Popen(["sh", "batch_master.sh"], cwd=folder) for _ in range(2)]
        assert [run.wait() for run in runs] == [0, 0]
        assert stub.batch_master(folder).stdout == ""
    wait_for_the_end("three tasks, perhaps twice")
    stub.check_results(folder)


def test_cancelled_killed_and_lost_tasks_are_submitted_again_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stub.generate(tmp_path, 5, 0, "--sbatch", "no-requeue", "--setup", HANG_ONCE)
    job = stub.batch_master(folder).stdout.strip()
    stub.wait_for_tasks(folder, 0, 1)
    slurm.ask_slurm("scancel", f"{job}_0")
    os.kill(stub.process_of(1, folder), signal.SIGKILL)
    stub.wait_for_tasks(folder, 2, 3)
    set_node("down")
    stub.wait_until(lambda: not stub.process_of(2, folder), "the end of task 2")
    stub.wait_until(lambda: stub.states(folder).get("missing") == "0-3", "four missing tasks")
    status = stub.batch_master(folder, "--status")
    assert status.returncode == 1
    assert "1 waiting (" in status.stdout
    for task, reason in enumerate(("CANCELLED", "Killed", "NODE FAILURE", "NODE FAILURE")):
        assert re.search(f"^{task} failed: .*{reason}", status.stdout, re.M), status.stdout
    set_node("resume")
    monkeypatch.setenv("STUB_AGAIN", "1")
    assert "submitted --array=0-3" in stub.batch_master(folder).stderr
    wait_for_the_end("five tasks")
    assert stub.states(folder) == {"done": "0-4"}
    stub.check_results(folder)


def test_both_arrays_then_the_ensemble_equal_one_process_to_the_byte(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "it's mine/repository"
    root.mkdir(parents=True)
    (root / "calc_anom_ensm.py").symlink_to(REPO / "calc_anom_ensm.py")
    monkeypatch.chdir(root)
    # Threads are recorded once per process and batch size, so take a size of this test alone.
    common = ["--data_dir", str(data_dir), "--mvtype", "pushpins_loco", "--initial_res", "64"]
    common += ["--n_projections", "8", "--batch_size", "3", "--device", "cpu"]
    levels = [*common, "--net", "resnet18", "--weights", "random", "--crop_size_ratio", ".99"]
    raw = [*common, "--rep", "0-1", "--crop_size_ratio", ".999"]
    threads = ["--setup", "export OMP_NUM_THREADS=1"]
    backbone.main([*levels, "--group", "class", *threads])
    pixels.main([*raw, *threads])

    folder = Path("../sinbad_runs/sbatches").resolve()
    stub.batch_master(folder)
    stub.wait_for_tasks(folder, 0)
    os.kill(stub.process_of(0, folder), signal.SIGKILL)
    wait_for_the_end("the killed task")
    page = (REPO / "docs/slurm.md").read_text("utf-8")
    (line,) = re.findall("```bash\n(levels=.*?)```", page, re.DOTALL)
    line = line.replace("--mvtype all", "--mvtype all --rep_num_224 2 --no-figures")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    subprocess.run(["bash", "-c", line], check=True)

    undisturbed = ["--results_dir", str(tmp_path / "undisturbed"), "--pyramid_level"]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sinbad_single_layer.main([*levels, *undisturbed, "7", "14"])
        sinbad_single_layer.main([*raw, *undisturbed, "224"])
    finally:
        torch.set_num_threads(n_threads)
    wait_for_the_end("all tasks and the ensemble")
    results = folder.parent / "results"
    output = "".join(path.read_text() for path in root.glob("slurm-*.out"))
    assert (results / "ensemble/scores.csv").exists(), output
    shutil.rmtree(results / "ensemble")
    assert files_below(results) == files_below(tmp_path / "undisturbed")
