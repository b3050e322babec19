"""The array generators on a real one-node Slurm; skipped, with the reason, where there is none.

munged, slurmctld and slurmd (Debian's slurm-wlm and munge) run in the foreground as children of the
test, with their own configuration, ports and state, and are ended by process id.
"""

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import slurm_stub as stub
import torch
from conftest import files_below

import create_batch_array_sinbad as backbone
import create_batch_array_sinbad_224 as pixels
import sinbad_single_layer
from sinbad import slurm

REPO = Path(__file__).resolve().parent.parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "squeue")

SLURM_CONF = """\
ClusterName=sinbadtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=0
KillWait=1
MaxArraySize=1001
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# The first four tasks hang, but not when they are submitted again.
HANG_ONCE = '[ $SLURM_ARRAY_TASK_ID -ge 4 ] || [ -n "$STUB_AGAIN" ] || export STUB_SECONDS=300'


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run a Slurm of one node, or skip and say why."""
    folders = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # Debian's daemons are in the latter
    programs = {name: shutil.which(name, path=folders) for name in PROGRAMS}
    if None in programs.values():
        pytest.skip(f"{programs} are not all installed (apt-get install slurm-wlm munge)")
    folder = tmp_path_factory.mktemp("s")
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    key, conf = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        ports = first.getsockname()[1], second.getsockname()[1]
    host, user = socket.gethostname().partition(".")[0], pwd.getpwuid(os.getuid()).pw_name
    conf.write_text(SLURM_CONF.format(folder=folder, host=host, ports=ports, user=user))
    files = [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    munged = ["--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    flags = ["-D", "-f", str(conf)]
    daemons = [
        ("munged", [*munged, *files], (folder / "munge.socket").exists),
        ("slurmctld", flags, lambda: "is UP" in subprocess.getoutput("scontrol ping")),
        ("slurmd", flags, lambda: subprocess.getoutput("sinfo -ho%T") == "idle"),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("SLURM_CONF", str(conf))
        for name, arguments, is_up in daemons:
            output = folder / f"{name}.out"
            log = stack.enter_context(output.open("wb"))
            process = subprocess.Popen([programs[name], *arguments], stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            try:
                stub.wait_until(is_up, name)
            except AssertionError:
                pytest.skip(f"{name} did not start: {output.read_text(errors='replace')[-500:]}")
        yield


@pytest.fixture(autouse=True)
def no_jobs_left(cluster: None) -> Iterator[None]:
    """Cancel what a test leaves, so that no task outlives the daemons."""
    yield
    slurm.ask_slurm("scancel", f"--user={os.getuid()}")
    wait_for_the_end("the last jobs")


def job_listing() -> list[str]:
    """Return squeue's listing of all jobs, a line per task."""
    return slurm.ask_slurm("squeue", "--noheader", "--array", "--format=%F_%K %T").splitlines()


def set_node(state: str) -> None:
    """Set the state of the only node."""
    node = slurm.ask_slurm("sinfo", "--noheader", "--format=%n").strip()
    slurm.ask_slurm("scontrol", "update", f"nodename={node}", f"state={state}", "reason=test")


@contextlib.contextmanager
def drained_node() -> Iterator[None]:
    """Let no job start for a while."""
    set_node("drain")
    try:
        yield
    finally:
        set_node("resume")


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
    with drained_node():
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
            assert stub.batch_master(folder).returncode == -9
        assert stub.batch_master(folder).stdout == ""
        assert "missing" not in stub.states(folder)
        assert stub.states(stub.generate(tmp_path / "b", 43, 0)) == {"missing": "0-42"}
        job = job_listing()[0].partition("_")[0]
        slurm.ask_slurm("scancel", f"{job}_[4,12,16]")
        assert stub.states(folder)["missing"] == "4,12,16"
        assert "submitted --array=4,12,16%3" in stub.batch_master(folder).stderr


def test_two_submissions_at_the_same_moment_cost_work_alone(tmp_path: Path) -> None:
    folder = stub.generate(tmp_path / "it's mine", 3, 0)
    with drained_node():
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
    root = tmp_path / "it's mine"
    root.mkdir()
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
    line = re.search(r"```bash\n(levels=.*?)```", page, re.DOTALL)[1]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    subprocess.run(["bash", "-c", line.replace("all", "all --rep_num_224 2")], check=True)

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
    assert (results / "ensemble/scores.csv").exists(), next(root.glob("slurm-*.out")).read_text()
    shutil.rmtree(results / "ensemble")
    assert files_below(results) == files_below(tmp_path / "undisturbed")
