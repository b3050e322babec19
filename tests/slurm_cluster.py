"""A real Slurm of one node for the tests: munged, slurmctld and slurmd, without systemd.

Debian packages slurm-wlm and munge. The daemons run in the foreground as children of the test, with
their own configuration, ports and state, and are ended by process id.
"""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_stub import wait_until

from sinbad import errors, slurm

COMMANDS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue")
SECONDS_TO_START = 60.0
SECONDS_TO_END = 10.0

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


def program_path(name: str) -> str:
    """Return where a program is installed; Debian keeps daemons off a user's PATH."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed (apt-get install slurm-wlm munge)")
    return path


def free_ports(n: int) -> list[int]:
    """Return TCP ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for unused in sockets:
            unused.bind(("127.0.0.1", 0))
        return [unused.getsockname()[1] for unused in sockets]


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[None]:
    """Start a Slurm of one node, or skip and say why; end it, and its jobs, at the end."""
    programs = {name: program_path(name) for name in ("munged", "slurmctld", "slurmd", *COMMANDS)}
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key, conf = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    host, user = socket.gethostname().partition(".")[0], pwd.getpwuid(os.getuid()).pw_name
    conf.write_text(SLURM_CONF.format(folder=folder, host=host, ports=free_ports(2), user=user))
    files = [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    munged = ["--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    slurm_flags = ["-D", "-f", str(conf)]
    daemons = (
        ("munged", [*munged, *files], lambda: (folder / "munge.socket").exists()),
        ("slurmctld", slurm_flags, lambda: answer("scontrol", "ping") is not None),
        ("slurmd", slurm_flags, lambda: answer("sinfo", "-ho%T") in ("idle\n", "mixed\n")),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("SLURM_CONF", str(conf))
        for name, arguments, is_up in daemons:
            output = folder / f"{name}.out"
            log = stack.enter_context(output.open("wb"))
            process = subprocess.Popen([programs[name], *arguments], stdout=log, stderr=log)
            stack.callback(end, process)
            wait_or_skip(is_up, name, output)
        stack.callback(end_jobs)
        yield


def answer(*command: str) -> str | None:
    """Return what one of Slurm's commands prints, None if it fails."""
    with contextlib.suppress(errors.UserError):
        return slurm.ask_slurm(*command)
    return None


def wait_or_skip(is_up: Callable[[], bool], daemon: str, output: Path) -> None:
    """Wait for a daemon; if it does not come, skip with its last words."""
    try:
        wait_until(is_up, SECONDS_TO_START, daemon)
    except TimeoutError:
        words = output.read_text(errors="replace").strip().splitlines()
        pytest.skip(f"{daemon} did not start: {(words or ['no output'])[-1]}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a daemon."""
    process.terminate()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_jobs() -> None:
    """Cancel what a failed test left, so that no task outlives the daemons."""
    slurm.ask_slurm("scancel", f"--user={os.getuid()}")
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not job_listing(), SECONDS_TO_END, "the last jobs")


def job_listing() -> list[str]:
    """Return squeue's listing of all jobs, a line per task."""
    return slurm.ask_slurm("squeue", "--noheader", "--array", "--format=%F_%K %T").splitlines()


def set_node(state: str) -> None:
    """Set the state of the only node."""
    node = slurm.ask_slurm("sinfo", "--noheader", "--format=%n").strip()
    slurm.ask_slurm("scontrol", "update", f"nodename={node}", f"state={state}", "reason=test")


@contextlib.contextmanager
def drained_node(*, cancel: bool) -> Iterator[None]:
    """Let no job start; afterwards cancel those that wait, or let them start."""
    set_node("drain")
    try:
        yield
    finally:
        if cancel:
            slurm.ask_slurm("scancel", f"--user={os.getuid()}")
        set_node("resume")
