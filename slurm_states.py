"""The folder of an array: its tasks, what was submitted of them, and what has become of it.

A task is done when all of its output files exist, running when squeue shows it (waiting included)
or a local run of it holds its log, else missing. Submission, local runs and --status all ask
`look`. Standard library only: it runs on login nodes.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from command_line import UserError, say
from slurm_patterns import (
    expand_numbers,
    expand_pattern,
    group_by_value,
    name_tasks,
    shorten_numbers,
)

LOGS = "logs"
LOCAL_JOB = "local"
ARRAY, ENSEMBLE = "array", "ensemble"
ENSEMBLE_DONE = "ensemble.done"
DEFAULT_MAX_ARRAY_SIZE = 1001  # slurm.conf's own default
GENERATE = "write it with create_batch_array_sinbad.py or create_batch_array_sinbad_224.py"
TRY_AGAIN = "try again when Slurm answers, or remove submitted.tsv if it never will"
HEADER_OF_LOG = re.compile(r"task \d+ on \S+, .*: ")  # of array.sbatch
WIDTH_OF_REASON = 200  # characters of a log's last line
WHOLE_LISTS = {"SLURM_BITSTR_LEN": "0"}  # squeue cuts an array's indices at 64 characters otherwise

# (state, reason) by (job id, index in the array, None of a job that is no array)
Jobs = dict[tuple[str, int | None], tuple[str, str]]


@dataclass(frozen=True)
class Task:
    """One line of tasks.tsv: its output files as one bash brace pattern, and the command."""

    outputs: str
    command: str


@dataclass(frozen=True)
class Batch:
    """What batch_master.sh must know of its folder; kept in batch.json.

    `sibling` is the folder of the other generator, None without --then_ensemble; `tasks_sha256`
    is of tasks.tsv.
    """

    name: str
    sbatch_lines: list[str]
    setup: list[str]
    throttle: int | None
    max_array_size: int | None
    mvtypes: list[str]
    version: str
    results_dir: str
    levels: list[int]
    reps: list[int]
    sibling: str | None
    ensemble_out: str | None
    dataset_dir: str
    tasks_sha256: str


@dataclass(frozen=True)
class Submission:
    """A line of submitted.tsv: a job, and which tasks are its array indices (minus `first`)."""

    job_id: str
    kind: str
    first: int = 0
    tasks: tuple[int, ...] = ()

    def log(self, task: int = 0) -> str:
        """Return the name of a log in FOLDER/logs; a local task's is of its own number."""
        if self.kind == ENSEMBLE:
            return f"{ENSEMBLE}_{self.job_id}.log"
        return f"{self.job_id}_{task - self.first}.log"


@dataclass
class Overview:
    """Which tasks are in which state.

    `waiting` are those of `running` that have not started, with Slurm's reason; `alive_jobs` are
    the array indices that squeue shows, by job.
    """

    n_tasks: int
    done: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    waiting: dict[int, str] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    alive_jobs: dict[str, list[int]] = field(default_factory=dict)

    def line(self) -> str:
        """Say how many are done, running, missing."""
        waiting = f" ({len(self.waiting)} of them waiting)" if self.waiting else ""
        return (
            f"{self.n_tasks} tasks: {len(self.done)} done, {len(self.running)} running{waiting}, "
            f"{len(self.missing)} missing"
        )


# --- files of the folder ---------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def sha256_of(data: bytes) -> str:
    """Return what batch.json keeps of tasks.tsv."""
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def in_one_line(path: Path, cure: str = GENERATE) -> Iterator[None]:
    """Turn what reading a missing or damaged file of the folder raises into one line."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} must be a file, got none; {cure}") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} must be as it was written, got another text; {cure}") from None


def read_tasks(folder: Path) -> list[Task]:
    """Read tasks.tsv; it must be the generator's to the byte."""
    path, wanted = folder / "tasks.tsv", read_batch(folder).tasks_sha256
    with in_one_line(path):
        data = path.read_bytes()
        if sha256_of(data) != wanted:
            raise ValueError("edited, cut or of another batch.json")
        return [Task(*line.split("\t")[1:]) for line in data.decode("utf-8").splitlines()]


def read_batch(folder: Path) -> Batch:
    """Read batch.json."""
    with in_one_line(folder / "batch.json"):
        values = json.loads((folder / "batch.json").read_text(encoding="utf-8"))
        return Batch(**{one.name: values[one.name] for one in fields(Batch)})


def read_submissions(folder: Path) -> list[Submission]:
    """Read submitted.tsv, oldest first; empty if nothing has been submitted."""
    path = folder / "submitted.tsv"
    if not path.exists():
        return []
    with in_one_line(path, "remove it if squeue shows no job of that folder"):
        *lines, end = path.read_text(encoding="utf-8").split("\n")
        if end:
            raise ValueError("the last line was cut")
        rows = (line.split("\t") for line in lines)
        return [
            Submission(job_id, kind, int(first), tuple(expand_numbers(tasks)))
            for job_id, kind, first, tasks, _ in rows
        ]


def record_submission(folder: Path, new: Submission) -> None:
    """Add a line to submitted.tsv."""
    path = folder / "submitted.tsv"
    runs = ",".join(shorten_numbers(new.tasks))
    line = "\t".join([new.job_id, new.kind, str(new.first), runs, time.strftime("%FT%T")])
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    write_atomically(path, before + line + "\n")


@contextlib.contextmanager
def only_one(folder: Path, lock: str = ".lock", wait: bool = False) -> Iterator[None]:
    """Hold a lock of the folder, so that two batch_master.sh do not submit the same tasks."""
    with (folder / lock).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(
                f"{folder} must be driven by one batch_master.sh or generator at a time, got a "
                f"second; wait for the first"
            ) from None
        except OSError:
            pass  # a file system without locks: the person must not start two
        yield


def is_held(log: Path) -> bool:
    """Say whether a local task still runs: it holds a lock on its log (see `slurm_jobs`)."""
    with contextlib.suppress(FileNotFoundError), log.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass  # a file system without locks
    return False


# --- Slurm -----------------------------------------------------------------------------------


def ask_slurm(command: list[str], folder: Path | None = None, cure: str = TRY_AGAIN) -> str:
    """Run one of Slurm's commands and return what it prints.

    The person's own settings of squeue's format and filters (SQUEUE_...) do not count.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        result = subprocess.run(
            command, cwd=folder, env={**own, **WHOLE_LISTS}, capture_output=True,
            encoding="utf-8", errors="replace", check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise UserError(
            f"Slurm's {command[0]} must be on the PATH, got none; run this on a login node of a "
            f"cluster, or run the tasks here without Slurm: sh batch_master.sh --local 2"
        ) from None
    if result.returncode:
        raise UserError(
            f"`{shlex.join(command)}` must succeed, got exit status {result.returncode}: "
            f"{result.stderr.strip()}; {cure}"
        )
    return result.stdout


def max_array_size(batch: Batch) -> int:
    """Return the flag's value, else what this cluster allows: indices stay below it."""
    if batch.max_array_size is not None:
        return batch.max_array_size
    for line in ask_slurm(["scontrol", "show", "config"]).splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize" and value.strip().isdigit():
            return int(value)
    return DEFAULT_MAX_ARRAY_SIZE


def list_jobs() -> Jobs:
    """Ask squeue for this user's jobs."""
    # Not with --array: it leaves out the last index of a waiting array like 0-20:4.
    command = ["squeue", "--noheader", f"--user={os.getuid()}", "--format=%F %K %T %r"]
    jobs: Jobs = {}
    for line in ask_slurm(command).splitlines():
        try:
            job_id, indices, state, reason = line.split(maxsplit=3)
            numbers = [None] if indices == "N/A" else expand_numbers(indices.partition("%")[0])
        except ValueError:
            raise UserError(
                f"a line of squeue must be job id, array indices, state and reason, got {line}; "
                f"{TRY_AGAIN}"
            ) from None
        jobs |= {(job_id, number): (state, reason) for number in numbers}
    return jobs


def list_jobs_of(submissions: list[Submission]) -> Jobs:
    """Return `list_jobs`; nothing where nothing was submitted, or Slurm is not to be asked."""
    if all(submission.job_id == LOCAL_JOB for submission in submissions):
        return {}
    if shutil.which("squeue") is None:
        say("note: squeue is not on the PATH, what was submitted to Slurm counts as not running")
        return {}
    return list_jobs()


# --- states ----------------------------------------------------------------------------------


def is_done(task: Task) -> bool:
    """Say whether all output files of a task exist."""
    return all(map(os.path.exists, expand_pattern(task.outputs)))


def find_alive(folder: Path) -> tuple[dict[int, tuple[str, str]], dict[str, list[int]]]:
    """Return (state, reason) by task, and array indices by job, of what waits or runs."""
    submissions = [one for one in read_submissions(folder) if one.kind == ARRAY]
    jobs = list_jobs_of(submissions)
    alive: dict[int, tuple[str, str]] = {}
    alive_jobs: dict[str, list[int]] = {}
    for submission in submissions:
        for task in submission.tasks:
            index = task - submission.first
            job = jobs.get((submission.job_id, index))
            if job is not None:
                alive[task] = job
                alive_jobs.setdefault(submission.job_id, []).append(index)
            elif submission.job_id == LOCAL_JOB and is_held(folder / LOGS / submission.log(task)):
                alive[task] = ("RUNNING", "")
    return alive, alive_jobs


def look(folder: Path, tasks: list[Task]) -> Overview:
    """Find out the state of every task; used by submission, local runs and --status alike.

    Slurm is asked only if a task is unfinished; then the files are looked at again, as tasks may
    have ended meanwhile.
    """
    overview = Overview(len(tasks))
    unfinished = {i for i, task in enumerate(tasks) if not is_done(task)}
    alive, overview.alive_jobs = find_alive(folder) if unfinished else ({}, {})
    for i, task in enumerate(tasks):
        if i not in unfinished or is_done(task):
            overview.done.append(i)
        elif i in alive:
            overview.running.append(i)
            state, reason = alive[i]
            if state == "PENDING":
                overview.waiting[i] = reason
        else:
            overview.missing.append(i)
    return overview


def last_words(log: Path) -> str:
    """Return the last line of a log, or its beginning; not what array.sbatch itself writes."""
    if not log.exists():
        return "ended without a log"
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    if not lines or HEADER_OF_LOG.match(lines[-1]):
        return "ended without a word"
    return textwrap.shorten(lines[-1], WIDTH_OF_REASON, placeholder=" ...")


def last_log(folder: Path, task: int, submissions: list[Submission]) -> Path | None:
    """Return the log of a missing task's last run; None if it never ran."""
    runs = [one for one in submissions if one.kind == ARRAY and task in one.tasks]
    if not runs:
        return None
    log = folder / LOGS / runs[-1].log(task)
    if runs[-1].job_id == LOCAL_JOB and not log.exists():
        return None  # its turn has not come, or the local run was ended before
    return log


def alive_ensembles(folders: list[Path]) -> dict[str, str]:
    """Return the state of the ensembles of these folders that wait or run, by job id."""
    submissions = [one for folder in folders for one in read_submissions(folder)]
    ensembles = [one for one in submissions if one.kind == ENSEMBLE]
    jobs = list_jobs_of(ensembles)
    ids = dict.fromkeys(one.job_id for one in ensembles)
    return {job_id: jobs[job_id, None][0] for job_id in ids if (job_id, None) in jobs}


def find_ensemble_done(folders: list[Path]) -> Path | None:
    """Return what an ensemble left that has succeeded since the folders were generated."""
    generated = [folder / "batch.json" for folder in folders]
    if not all(path.exists() for path in generated):
        return None
    newest = max(path.stat().st_mtime for path in generated)
    found = [path for folder in folders if (path := folder / ENSEMBLE_DONE).exists()]
    return next((path for path in found if path.stat().st_mtime >= newest), None)


def ensemble_state(folders: list[Path]) -> tuple[str, bool]:
    """Return what has become of the ensemble of two folders, and whether it failed."""
    if find_ensemble_done(folders):
        return "done", False
    alive = alive_ensembles(folders)
    if alive:
        return ", ".join(f"{state.lower()}, job {job}" for job, state in alive.items()), False
    for folder in folders:
        for submission in reversed(read_submissions(folder)):
            if submission.kind == ENSEMBLE:
                log = folder / LOGS / submission.log()
                return f"failed: {last_words(log)} ({log})", True
    return "not submitted", False


def print_status(folder: Path) -> int:
    """Print the table of done, running, missing with reasons; return 1 if any is missing."""
    tasks, sibling = read_tasks(folder), read_batch(folder).sibling
    overview, submissions = look(folder, tasks), read_submissions(folder)
    print(f"{'state':<10}{'tasks':>6}  which")
    for state in ("done", "running", "missing"):
        numbers = getattr(overview, state)
        print(f"{state:<10}{len(numbers):>6}  {','.join(shorten_numbers(numbers))}".rstrip())
    for reason, numbers in group_by_value(overview.waiting).items():
        print(f"{name_tasks(numbers)} of the running waiting: {reason}")
    logs = {task: last_log(folder, task, submissions) for task in overview.missing}
    failures = {task: last_words(log) for task, log in logs.items() if log is not None}
    for words, numbers in group_by_value(failures).items():
        print(f"{name_tasks(numbers)} failed: {words} ({logs[numbers[0]]})")
    if overview.missing and not submissions:
        say(f"nothing was submitted yet; next: sh {shlex.quote(str(folder / 'batch_master.sh'))}")
    state, failed = ensemble_state([folder, Path(sibling)]) if sibling else ("", False)
    if state:
        print(f"ensemble  {state}")
    return int(failed or bool(overview.missing))
