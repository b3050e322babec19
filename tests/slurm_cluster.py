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
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_stub import wait_until

from sinbad import slurm

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


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[None]:
    """Start a Slurm of one node, or skip and say why; end it, and its jobs, at the end."""
    folders = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # Debian's daemons are in the latter
    programs = {name: shutil.which(name, path=folders) for name in PROGRAMS}
    if None in programs.values():
        pytest.skip(f"{programs} are not all installed (apt-get install slurm-wlm munge)")
    for name in ("state", "spool"):
        (folder / name).mkdir()
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
    daemons = [
        ("munged", [*munged, *files], (folder / "munge.socket").exists),
        (
            "slurmctld",
            ["-D", "-f", str(conf)],
            lambda: "is UP" in subprocess.getoutput("scontrol ping"),
        ),
        ("slurmd", ["-D", "-f", str(conf)], lambda: subprocess.getoutput("sinfo -ho%T") == "idle"),
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
                wait_until(is_up, name)
            except AssertionError:
                pytest.skip(f"{name} did not start: {output.read_text(errors='replace')[-500:]}")
        yield


def end_jobs() -> None:
    """Cancel what a failed test left, so that no task outlives the daemons."""
    slurm.ask_slurm("scancel", f"--user={os.getuid()}")
    wait_until(lambda: not job_listing(), "the last jobs", 10)


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
