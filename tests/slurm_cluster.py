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
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue")
SECONDS_TO_START = 60.0
SECONDS_TO_END = 10.0

SLURM_CONF = """\
ClusterName=sinbadtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
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
MaxJobCount=5000
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class SlurmMissingError(Exception):
    """Why there is no Slurm to test on."""


def program_path(name: str) -> str:
    """Return where a program is installed; Debian keeps daemons off a user's PATH."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise SlurmMissingError(f"{name} is not installed (apt-get install slurm-wlm munge)")
    return path


def free_ports(n: int) -> list[int]:
    """Return TCP ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for a condition; a test that waits too long fails and names what it waited for."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.1)


def answers(*command: str) -> bool:
    """Say whether a command succeeds."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def node_is_up() -> bool:
    """Say whether the node takes jobs."""
    listing = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True, check=False
    )
    return listing.stdout.strip() in ("idle", "mixed", "allocated")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a daemon that we started."""
    process.terminate()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Path]:
    """Start the three daemons and yield their slurm.conf (for SLURM_CONF); end them afterwards.

    Parameters
    ----------
    folder : Path
        Takes configuration, state and logs; a short path (a socket's is limited to 107 bytes).

    Raises
    ------
    SlurmMissingError
        If a daemon is not installed or does not start; the message says which and why.
    """
    programs = {name: program_path(name) for name in (*DAEMONS, *COMMANDS)}
    host = socket.gethostname().partition(".")[0]
    controller_port, node_port = free_ports(2)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    conf = folder / "slurm.conf"
    conf.write_text(
        SLURM_CONF.format(
            folder=folder,
            host=host,
            controller_port=controller_port,
            node_port=node_port,
            user=pwd.getpwuid(os.getuid()).pw_name,
        )
    )
    own = [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    munged = ["--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    slurm = ["-D", "-f", str(conf)]
    arguments = {"munged": munged + own, "slurmctld": slurm, "slurmd": slurm}
    with contextlib.ExitStack() as stack:
        stack.enter_context(environment("SLURM_CONF", str(conf)))
        for name in DAEMONS:
            log = stack.enter_context((folder / f"{name}.out").open("wb"))
            process = subprocess.Popen([programs[name], *arguments[name]], stdout=log, stderr=log)
            stack.callback(end, process)
            if name == "munged":
                wait_or_give_up(lambda: (folder / "munge.socket").exists(), name, folder)
            if name == "slurmctld":
                wait_or_give_up(lambda: answers("scontrol", "ping"), name, folder)
        wait_or_give_up(node_is_up, "slurmd", folder)
        stack.callback(end_jobs)
        yield conf


def end_jobs() -> None:
    """Cancel what a failed test left, so that no task outlives the daemons."""
    subprocess.run(["scancel", f"--user={os.getuid()}"], capture_output=True, check=False)
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not job_listing(), SECONDS_TO_END, "the last jobs")


def job_listing() -> str:
    """Return squeue's listing of all jobs, array tasks one a line; empty if there are none."""
    command = ["squeue", "--noheader", "--array", "--format=%F %K %T"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def wait_or_give_up(condition: Callable[[], bool], daemon: str, folder: Path) -> None:
    """Wait for a daemon; if it does not come, say why with its last words."""
    try:
        wait_until(condition, SECONDS_TO_START, daemon)
    except TimeoutError:
        words = (folder / f"{daemon}.out").read_text(errors="replace").strip().splitlines()
        raise SlurmMissingError(f"{daemon} did not start: {(words or ['no output'])[-1]}") from None


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
