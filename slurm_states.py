"""What has been submitted of a folder of tasks, and what has become of it.

A task is done when all of its output files exist, running when squeue shows it (waiting included),
else missing. Submission, local runs and --status all ask `look`.
"""

import os
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from command_line import UserError
from slurm_arrays import Task, expand_pattern, read_tasks, shorten_numbers, write_atomically

LOCAL_JOB = "local"
ARRAY, ENSEMBLE = "array", "ensemble"


@dataclass(frozen=True)
class Submission:
    """A line of submitted.tsv: a job, and which tasks are its array indices (minus `first`)."""

    job_id: str
    kind: str
    first: int
    tasks: tuple[int, ...]

    def log(self, task: int) -> str:
        """Return the name of a task's log in FOLDER/logs."""
        if self.job_id == LOCAL_JOB:
            return f"{LOCAL_JOB}_{task}.log"
        return f"{self.job_id}_{task - self.first}.log"


@dataclass
class Overview:
    """Which tasks are in which state; `waiting` are those of `running` that have not started."""

    n_tasks: int
    done: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    alive_jobs: dict[str, list[int]] = field(default_factory=dict)

    def line(self) -> str:
        """Say how many are done, running, missing."""
        waiting = f" ({len(self.waiting)} of them waiting)" if self.waiting else ""
        return (
            f"{self.n_tasks} tasks: {len(self.done)} done, {len(self.running)} running{waiting}, "
            f"{len(self.missing)} missing"
        )


def read_submissions(folder: Path) -> list[Submission]:
    """Read submitted.tsv, oldest first; empty if nothing has been submitted."""
    path = folder / "submitted.tsv"
    submissions = []
    for line in path.read_text().splitlines() if path.exists() else []:
        job_id, kind, first, runs, *_ = line.split("\t")
        tasks: list[int] = []
        for run in filter(None, runs.split(",")):
            low, _, high = run.partition("-")
            tasks += range(int(low), int(high or low) + 1)
        submissions.append(Submission(job_id, kind, int(first), tuple(tasks)))
    return submissions


def record_submission(folder: Path, new: Submission) -> None:
    """Add a line to submitted.tsv."""
    path = folder / "submitted.tsv"
    runs = ",".join(shorten_numbers(new.tasks))
    line = "\t".join([new.job_id, new.kind, str(new.first), runs, time.strftime("%FT%T")])
    write_atomically(path, (path.read_text() if path.exists() else "") + line + "\n")


def ask_slurm(command: list[str], folder: Path | None = None) -> str:
    """Run one of Slurm's commands and return what it prints."""
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} must be on the PATH, got none; run this on a login node of a Slurm "
            f"cluster, or run the tasks here: sh batch_master.sh --local 2"
        ) from None
    if result.returncode:
        raise UserError(
            f"{command[0]} must succeed, got exit status {result.returncode} from "
            f"`{shlex.join(command)}`: {result.stderr.strip()}; what was submitted before is kept"
        )
    return result.stdout


def list_jobs() -> dict[tuple[str, str], str]:
    """Return state by (job id, array index or "N/A") of this user's jobs; none without Slurm."""
    if shutil.which("squeue") is None:
        return {}
    uid = str(os.getuid())
    listing = ask_slurm(["squeue", "--noheader", "--array", f"--user={uid}", "--format=%F %K %T"])
    rows = (line.split() for line in listing.splitlines())
    return {(job_id, index): state for job_id, index, state in rows}


def look(folder: Path, tasks: list[Task]) -> Overview:
    """Find out the state of every task; used by submission, local runs and --status alike."""
    submissions = [s for s in read_submissions(folder) if s.job_id != LOCAL_JOB]
    jobs = list_jobs() if submissions else {}
    alive: dict[int, str] = {}
    overview = Overview(len(tasks))
    for submission in submissions:
        for task in submission.tasks:
            index = task - submission.first
            state = jobs.get((submission.job_id, str(index)))
            if state is not None:
                alive[task] = state
                overview.alive_jobs.setdefault(submission.job_id, []).append(index)
    for i, task in enumerate(tasks):
        if all(map(os.path.exists, expand_pattern(task.outputs))):
            overview.done.append(i)
        elif i in alive:
            overview.running.append(i)
            if alive[i] == "PENDING":
                overview.waiting.append(i)
        else:
            overview.missing.append(i)
    return overview


def failure_reason(folder: Path, task: int, submissions: list[Submission]) -> str | None:
    """Return the last log line of a task's last run; None if it was never submitted."""
    runs = [s for s in submissions if s.kind == ARRAY and task in s.tasks]
    if not runs:
        return None
    path = folder / "logs" / runs[-1].log(task)
    if not path.exists():
        return f"ended before it started: no log {path}"
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1].strip() if lines else 'ended without a word'} ({path})"


def print_status(folder: Path) -> int:
    """Print the table of done, running, missing with reasons; return 1 if any is missing."""
    tasks = read_tasks(folder)
    overview, submissions = look(folder, tasks), read_submissions(folder)
    print(f"{'state':<10}{'tasks':>6}  which")
    for state in ("done", "running", "missing"):
        numbers = getattr(overview, state)
        print(f"{state:<10}{len(numbers):>6}  {','.join(shorten_numbers(numbers))}".rstrip())
    for task in overview.missing:
        reason = failure_reason(folder, task, submissions)
        if reason is not None:
            print(f"task {task} failed: {reason}")
    return int(bool(overview.missing))
