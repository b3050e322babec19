"""Folders of tasks that take a known time and write a line each, and ways to run and end them.

The generators write them as they write the real ones, only the program of the tasks is a stub.
"""

import contextlib
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import create_batch_array_sinbad_224 as pixels
from sinbad import slurm

# Writes like the real program: a temporary name, then renamed. Fails at the repetition STUB_FAILS.
STUB = """\
import os, pathlib, sys, time
words = "\\0".join(sys.argv).replace("=", "\\0").split("\\0")
flags = dict(zip(words, words[1:]))
folder = pathlib.Path(flags["--results_dir"], flags["--version_name"] + "_pyramid_lvl_224")
folder = folder / f"rep_num_{flags['--rep']}" / flags["--mvtype"]
folder.mkdir(parents=True, exist_ok=True)
if flags["--rep"] == os.environ.get("STUB_FAILS"):
    sys.exit("error: rep must be another, got it; this line is the reason")
partial = folder / f".{os.getpid()}"
with partial.open("w") as stream:
    stream.write("half")
    stream.flush()
    time.sleep(float(os.environ["STUB_SECONDS"]))
    stream.write(f" and half of {flags['--rep']}")
partial.replace(folder / "1022.00_lvl_anom_maps.npz")
"""


def generate(root: Path, n_tasks: int, seconds: float, *flags: str) -> Path:
    """Generate a folder of stub tasks, one per repetition, and return it."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "stub.py").write_text(STUB)
    stub_flags = ["--out_dir", str(root / "sbatches"), "--results_dir", str(root / "results")]
    stub_flags += ["--mvtype", "pushpins_loco", "--rep", f"0-{n_tasks - 1}", "--reps_per_task", "1"]
    stub_flags += ["--device", "cpu", "--setup", f"export STUB_SECONDS={seconds}"]
    with mock.patch.object(slurm, "TASK_PROGRAM", root / "stub.py"):
        pixels.main([*stub_flags, *flags])
    return root / "sbatches"


def commands(folder: Path) -> list[str]:
    """Return the commands of a folder's tasks."""
    rows = (folder / "tasks.tsv").read_text("utf-8").split("\n")[:-1]
    return [row.split("\t")[1] for row in rows]


def check_results(folder: Path) -> None:
    """Compare what the tasks of a folder have written with what undisturbed tasks write."""
    outputs = slurm.read_outputs(folder / "tasks.tsv")
    expected = [f"half and half of {rep}" for rep in range(len(outputs))]
    assert [Path(path).read_text() for (path,) in outputs] == expected


def batch_master(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run `sh batch_master.sh` in its folder."""
    command = ["sh", "batch_master.sh", *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def states(folder: Path) -> dict[str, str]:
    """Return state -> indices that --status prints."""
    lines = batch_master(folder, "--status").stdout.splitlines()
    rows = [line.split(" ", 2) for line in lines if "failed:" not in line]
    return {state: "".join(indices) for count, state, *indices in rows if count != "0"}


def process_of(task: int, folder: Path) -> int | None:
    """Return the process that runs the command of a task, None if none does."""
    words = shlex.split(commands(folder)[task])
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if path.read_text(errors="replace").split("\0")[:-1] == words:
                return int(path.parent.name)
    return None


def wait_until(condition: Callable[[], object], event: str, seconds: float = 120.0) -> None:
    """Wait for a condition; a test that waits too long fails and names the event."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s for {event}"
        time.sleep(0.1)


def wait_for_tasks(folder: Path, *tasks: int) -> None:
    """Wait until tasks are at work."""
    wait_until(lambda: all(process_of(i, folder) for i in tasks), f"tasks {tasks}")
