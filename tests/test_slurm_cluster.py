"""The array generators on a real one-node Slurm; skipped, with the reason, where there is none."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from slurm_cluster import SlurmMissingError, end_jobs, job_listing, running_cluster, wait_until
from slurm_stub import (
    batch_master,
    expected_results,
    kill_task,
    process_of,
    stub_batch,
    stub_results,
)

import create_batch_array_sinbad as network
import create_batch_array_sinbad_224 as pixels
import sinbad_single_layer
from sinbad import slurm

SECONDS_TO_START = 60.0
SECONDS_TO_FINISH = 300.0

# The first two tasks take long, but not when Slurm or we start them again.
HANG_ONCE = (
    "export STUB_SECONDS=$((SLURM_ARRAY_TASK_ID < 2 && !SLURM_RESTART_COUNT && !STUB_AGAIN"
    f" ? {SECONDS_TO_FINISH:.0f} : 0))"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Give a running one-node Slurm, or skip and say why."""
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as folder:
        daemons = running_cluster(Path(folder))
        try:
            daemons.__enter__()
        except SlurmMissingError as error:
            pytest.skip(str(error))
        try:
            yield
        finally:
            daemons.__exit__(None, None, None)


@pytest.fixture
def slurm_commands(cluster: None) -> Iterator[None]:
    """Give the running Slurm to one test and cancel what it leaves."""
    yield
    end_jobs()


def is_quiet() -> bool:
    """Say whether Slurm has no jobs left."""
    return not job_listing()


def set_node(state: str) -> None:
    """Set the state of the only node."""
    node = slurm.ask_slurm(["sinfo", "--noheader", "--format=%n"]).strip()
    slurm.ask_slurm(["scontrol", "update", f"nodename={node}", f"state={state}", "reason=test"])


def contents(folder: Path) -> dict[Path, bytes]:
    """Return the bytes of all files below a folder, by relative path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_2500_tasks_are_split_and_submitted_once(slurm_commands: None, tmp_path: Path) -> None:
    folder = stub_batch(tmp_path, 2500, 0)
    set_node("drain")
    try:
        jobs = batch_master(folder).stdout.split()
        rows = [line.split() for line in job_listing().splitlines()]
        arrays = [sorted(int(index) for job, index, _ in rows if job == one) for one in jobs]
        assert arrays == [list(range(1001)), list(range(1001)), list(range(498))]
        again = batch_master(folder)
        assert again.stdout == ""
        assert "2500 tasks: 0 done, 2500 running (2500 of them waiting), 0 missing" in again.stderr
        slurm.ask_slurm(["scancel", f"{jobs[1]}_[4-6,8]"])
        assert "submitted --array=4-6,8 as job" in batch_master(folder).stderr
    finally:
        slurm.ask_slurm(["scancel", f"--user={os.getuid()}"])
        set_node("resume")
    wait_until(is_quiet, SECONDS_TO_FINISH, "the cancelled jobs")


@pytest.mark.parametrize("step", [1, 4, 7])
def test_evenly_spaced_tasks_are_submitted_once(
    slurm_commands: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    folder = stub_batch(tmp_path, 43, 0, "--throttle", "3")
    for task in set(range(43)) - set(range(0, 43, step)):
        path = Path(slurm.read_tasks(folder)[task][0])
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setenv("SQUEUE_ARRAY", "1")
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    set_node("drain")
    try:
        assert len(batch_master(folder).stdout.split()) == 1
        assert batch_master(folder).stdout == ""
        alive, missing = slurm.look(folder, slurm.read_tasks(folder))
        assert sorted(alive) == list(range(0, 43, step))
        assert all(reason for _, reason in alive.values())
        assert missing == []
    finally:
        slurm.ask_slurm(["scancel", f"--user={os.getuid()}"])
        set_node("resume")


def test_lines_of_later_arrays_are_counted_on(slurm_commands: None, tmp_path: Path) -> None:
    limits = ["--max_array_size", "2", "--throttle", "1"]
    folder = stub_batch(tmp_path, 3, 0, *limits, "--setup", "cd /")
    assert len(batch_master(folder).stdout.split()) == 2
    wait_until(is_quiet, SECONDS_TO_FINISH, "three tasks")
    assert batch_master(folder, "--status").returncode == 0
    assert stub_results(folder) == expected_results(3)


def test_a_throttle_holds_for_what_is_submitted_again(slurm_commands: None, tmp_path: Path) -> None:
    folder = stub_batch(tmp_path, 4, 0, "--throttle", "1", "--max_array_size", "2")
    set_node("drain")
    try:
        jobs = batch_master(folder).stdout.split()
        slurm.ask_slurm(["scancel", f"{jobs[0]}_1"])
        (again,) = batch_master(folder).stdout.split()
        shown = slurm.ask_slurm(["scontrol", "show", "job", again])
        assert all(f"afterany:{job}" in shown for job in jobs)
    finally:
        slurm.ask_slurm(["scancel", f"--user={os.getuid()}"])
        set_node("resume")


def wait_for_two_tasks(folder: Path) -> None:
    """Wait until the first two tasks are at work."""
    wait_until(lambda: all(process_of(t, folder) for t in (0, 1)), SECONDS_TO_START, "two tasks")


def test_a_node_that_goes_down_loses_nothing(slurm_commands: None, tmp_path: Path) -> None:
    folder = stub_batch(tmp_path, 3, 0, "--requeue", "--setup", HANG_ONCE)
    batch_master(folder)
    wait_for_two_tasks(folder)
    set_node("down")
    wait_until(lambda: not any(process_of(t, folder) for t in (0, 1)), SECONDS_TO_START, "an end")
    assert len(slurm.look(folder, slurm.read_tasks(folder))[0]) == 3
    set_node("resume")
    # Slurm holds requeued jobs back for two minutes; a person would wait.
    for job in {line.split()[0] for line in job_listing().splitlines()}:
        slurm.ask_slurm(["scontrol", "update", f"jobid={job}", "starttime=now"])
    wait_until(is_quiet, SECONDS_TO_FINISH, "three tasks")
    assert batch_master(folder, "--status").returncode == 0
    assert stub_results(folder) == expected_results(3)


def test_only_killed_tasks_are_submitted_again(
    slurm_commands: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stub_batch(tmp_path / "it's mine", 4, 0, "--setup", HANG_ONCE)
    (job,) = batch_master(folder).stdout.split()
    wait_for_two_tasks(folder)
    slurm.ask_slurm(["scancel", f"{job}_0"])
    kill_task(1, folder)
    wait_until(is_quiet, SECONDS_TO_FINISH, "the other two")
    status = batch_master(folder, "--status")
    assert status.returncode == 1
    assert "missing        2  0-1" in status.stdout
    assert re.search(r"^0 failed: .*CANCELLED", status.stdout, re.MULTILINE)
    assert re.search(r"^1 failed: .*Killed", status.stdout, re.MULTILINE)
    monkeypatch.setenv("STUB_AGAIN", "1")
    again = batch_master(folder)
    assert "4 tasks: 2 done, 0 running, 2 missing" in again.stderr
    assert "submitted --array=0-1 as job" in again.stderr
    wait_until(is_quiet, SECONDS_TO_FINISH, "two tasks")
    assert stub_results(folder) == expected_results(4)


def generate_both(root: Path, data_dir: Path) -> list[list[str]]:
    """Generate both folders, the ensemble after them; return the flags that fix the scores."""
    common = ["--data_dir", str(data_dir), "--mvtype", "pushpins_loco", "--initial_res", "64"]
    # Threads are recorded once a process and batch size, so take one of our own.
    common += ["--n_projections", "8", "--batch_size", "3", "--device", "cpu"]
    levels = [*common, "--net", "resnet18", "--weights", "random", "--crop_size_ratio", ".99"]
    raw = [*common, "--rep", "0-1", "--crop_size_ratio", ".999"]
    site = ["--setup", "export OMP_NUM_THREADS=1", "--requeue", "--results_dir", str(root / "r")]
    site += ["--then_ensemble", "--ensemble_out", str(root / "ensemble")]
    network.main(["--out_dir", str(root / "sbatches"), *levels, "--group", "class", *site])
    pixels.main(["--out_dir", str(root / "sbatches_224"), *raw, *site])
    return [[*levels, "--pyramid_level", "7", "14"], [*raw, "--pyramid_level", "224"]]


def test_two_submissions_at_once_and_one_killed_cost_work_alone(
    slurm_commands: None, tmp_path: Path
) -> None:
    folder = stub_batch(tmp_path, 3, 0)
    set_node("drain")
    try:
        runs = [subprocess.Popen(["sh", "batch_master.sh"], cwd=folder) for _ in range(2)]
        assert [run.wait(SECONDS_TO_START) for run in runs] == [0, 0]
        assert batch_master(folder).stdout == ""
    finally:
        set_node("resume")
    wait_until(is_quiet, SECONDS_TO_FINISH, "three tasks, perhaps twice")
    assert stub_results(folder) == expected_results(3)
    left = {path.name for path in (tmp_path / "sbatches").iterdir()}
    assert left == {"array.sbatch", "batch_master.sh", "tasks.tsv", "logs"}


def test_killed_after_sbatch_nothing_is_submitted_twice(
    slurm_commands: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stub_batch(tmp_path, 3, 0)
    real = shutil.which("sbatch")
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\n{real} "$@"\nkill -9 $PPID\n')
    (tmp_path / "sbatch").chmod(0o755)
    set_node("drain")
    try:
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
            assert batch_master(folder).returncode == -9
        assert len(job_listing().splitlines()) == 3
        assert batch_master(folder).stdout == ""
    finally:
        slurm.ask_slurm(["scancel", f"--user={os.getuid()}"])
        set_node("resume")


def run_in_one_process(flags: list[list[str]], results_dir: Path) -> dict[Path, bytes]:
    """Compute what the arrays compute, all of it in this process; the threads are the tasks'."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for levels in flags:
            sinbad_single_layer.main([*levels, "--results_dir", str(results_dir)])
    finally:
        torch.set_num_threads(n_threads)
    return contents(results_dir)


def test_both_arrays_and_the_ensemble_equal_one_process_to_the_byte(
    slurm_commands: None, tmp_path: Path, data_dir: Path
) -> None:
    root = tmp_path / "it's mine"
    first, second = root / "sbatches", root / "sbatches_224"
    flags = generate_both(root, data_dir)

    submitted = batch_master(first)
    assert "ensemble waits for 1 missing tasks of" in submitted.stderr
    (job,) = submitted.stdout.split()
    job_224, ensemble = batch_master(second).stdout.split()
    dependency = slurm.ask_slurm(["scontrol", "show", "job", ensemble])
    assert f"afterany:{job}" in dependency
    assert f"afterany:{job_224}" in dependency
    again = batch_master(first)
    assert again.stdout == ""
    assert f"ensemble submitted as job {ensemble}" in again.stderr

    wait_until(lambda: process_of(0, first) is not None, SECONDS_TO_START, "a task")
    kill_task(0, first)
    wait_until(lambda: job not in job_listing().split(), SECONDS_TO_FINISH, "its end")
    assert len(batch_master(first).stdout.split()) == 2  # the array and another ensemble
    assert batch_master(second).stdout == ""
    undisturbed = run_in_one_process(flags, root / "undisturbed")
    wait_until(is_quiet, SECONDS_TO_FINISH, "all tasks and the ensemble")
    assert contents(root / "r") == undisturbed
    for folder in (first, second):
        status = batch_master(folder, "--status")
        assert status.returncode == 0, status.stdout
        assert "ensemble  done" in status.stdout
        assert "ensemble done" in batch_master(folder).stderr

    after_slurm = contents(root / "ensemble")
    shutil.rmtree(root / "ensemble")
    assert "ensemble  missing" in batch_master(first, "--status").stdout
    assert batch_master(first, "--local", "1").returncode == 0
    assert contents(root / "ensemble") == after_slurm
