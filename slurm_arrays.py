"""Plan the tasks of a Slurm array and write the folder that runs them; used by both generators.

The folder holds `tasks.tsv` (index, outputs, command; one line a task), `array.sbatch` (runs one
line of it), `batch_master.sh` (submits what is unfinished, see slurm_jobs.py) and `batch.json`
(what batch_master.sh must know). Standard library only: it runs on login nodes.
"""

import argparse
import itertools
import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from command_line import UserError, flatten
from loco_datasets import expand_mvtypes, scores_file_name, scores_folder, split_mvtype
from slurm_flags import HANDED_ON, sbatch_lines

REPO_DIR = Path(__file__).absolute().parent
TASK_PROGRAM = REPO_DIR / "sinbad_single_layer.py"


@dataclass(frozen=True)
class Task:
    """One line of tasks.tsv: its output files as one bash brace pattern, and the command."""

    outputs: str
    command: str


@dataclass(frozen=True)
class Batch:
    """What batch_master.sh must know of its folder; kept in batch.json.

    `sibling` is the folder of the other generator, None without --then_ensemble.
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


# --- tasks -----------------------------------------------------------------------------------


def shorten_numbers(numbers: Iterable[int]) -> list[str]:
    """Shorten numbers to runs: 0 1 2 3 7 8 -> "0-3", "7-8"; what --rep and sbatch --array take."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return [str(low) if low == high else f"{low}-{high}" for low, high in runs]


def brace_pattern(values: Sequence[object]) -> str:
    """Write values as bash does: 7 -> "7", 7 14 -> "{7,14}", 0 ... 99 -> "{0..99}"."""
    if len(values) == 1:
        return str(values[0])
    if all(isinstance(v, int) for v in values):
        (run, *more) = shorten_numbers(values)  # type: ignore[arg-type]
        if not more:
            return "{" + run.replace("-", "..") + "}"
    return "{" + ",".join(map(str, values)) + "}"


def expand_pattern(pattern: str) -> list[str]:
    """Expand a brace pattern as bash does; the inverse of `brace_pattern`."""
    choices: list[list[str]] = []
    for i, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        first, dots, last = part.partition("..")
        if i % 2 and dots:
            choices.append([str(n) for n in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(",") if i % 2 else [part])
    return ["".join(parts) for parts in itertools.product(*choices)]


def plan_tasks(
    args: argparse.Namespace, levels: list[int], program: Path = TASK_PROGRAM
) -> list[Task]:
    """Split the work of the flags into tasks.

    Parameters
    ----------
    args : Namespace
        Flags of `add_task_flags`.
    levels : list of int
        Pyramid levels, all ResNet levels or only the raw-pixel one.
    program : Path
        Script that every task runs.

    Raises
    ------
    UserError
        If two crop ratios would write the same file, or a name is not a data set's.
    """
    names: dict[str, float] = {}
    for ratio in dict.fromkeys(args.crop_size_ratio):
        name = scores_file_name(levels[0], args.initial_res, ratio, args.crop_num_edge)
        if name in names:
            raise UserError(
                f"crop_size_ratio must give one file a ratio, got {names[name]} and {ratio} that "
                f"both write {name}; give the second another --version_name"
            )
        names[name] = ratio
    mvtypes, reps = expand_mvtypes(args.mvtype), flatten(args.rep)
    step = args.reps_per_task or len(reps)
    rep_parts = [reps[i : i + step] for i in range(0, len(reps), step)]
    if args.group == "class":
        classes = dict.fromkeys(split_mvtype(mvtype)[0] for mvtype in mvtypes)
        sets = [[m for m in mvtypes if split_mvtype(m)[0] == name] for name in classes]
        parts = itertools.product(sets, [levels], [list(names)], rep_parts)
    else:
        parts = itertools.product(
            [[m] for m in mvtypes], [[v] for v in levels], [[n] for n in names], rep_parts
        )
    return [
        Task(
            _outputs(args, task_sets, task_levels, task_reps, files),
            _command(args, task_sets, task_levels, task_reps, [names[f] for f in files], program),
        )
        for task_sets, task_levels, files, task_reps in parts
    ]


def _outputs(
    args: argparse.Namespace, mvtypes: list[str], levels: list[int], reps: list[int],
    file_names: list[str],
) -> str:  # fmt: skip
    """Return the brace pattern of a task's output files."""
    level, rep = (brace_pattern(numbers) for numbers in (levels, reps))
    # A pattern stands where one number stands otherwise.
    folder = scores_folder(args.results_dir, args.version_name, level, rep, brace_pattern(mvtypes))
    return str(folder / brace_pattern(file_names))


def _command(
    args: argparse.Namespace, mvtypes: list[str], levels: list[int], reps: list[int],
    ratios: list[float], program: Path,
) -> str:  # fmt: skip
    """Return a task's command, ready to paste into a shell; it runs from any folder."""
    words = [sys.executable, program, "--version_name", args.version_name, "--mvtype", *mvtypes]
    words += ["--pyramid_level", *levels, "--crop_size_ratio", *ratios]
    words += ["--rep", *shorten_numbers(reps), "--initial_res", args.initial_res]
    words += ["--crop_num_edge", args.crop_num_edge]
    words += ["--data_dir", args.data_dir, "--results_dir", args.results_dir]
    for name in HANDED_ON:
        value = getattr(args, name)
        words += [] if value is None else [f"--{name}", value]
    words += ["--official"] if args.official else []
    return shlex.join(map(str, words))


# --- files -----------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def render_sbatch(batch: Batch, job_name: str, log: str, about: str, body: str) -> str:
    """Return a script for sbatch: header, the set-up lines, then `body`."""
    header = [
        "#!/bin/bash",
        f"# {about}",
        f"#SBATCH --job-name={job_name}",
        f"#SBATCH --output=logs/{log}",
        "#SBATCH --open-mode=append",  # a requeued task keeps the log of its first run
        *batch.sbatch_lines,
        "# The set-up lines may source files that only the cluster has.",
        "# shellcheck disable=SC1090,SC1091",
    ]
    setup = [*batch.setup, ""] if batch.setup else []
    return "\n".join([*header, "", *setup, body])


ARRAY_BODY = """\
tasks={tasks}
task=$((SLURM_ARRAY_TASK_ID + ${{1:-0}}))
command=$(awk -F '\\t' -v task="$task" '$1 == task {{ print $3 }}' "$tasks")
if [ -z "$command" ]; then
    echo "error: task must be one of $tasks, got $task; generate the folder again" >&2
    exit 2
fi
echo "task $task on $(hostname), $(date): $command"
eval "$command"
"""

BATCH_MASTER = """\
#!/bin/sh
# Submit the unfinished tasks of tasks.tsv, print the job ids. Written by {script}.
#
#     sh batch_master.sh             submit what is missing or failed, nothing twice
#     sh batch_master.sh --local 2   run the same tasks here without Slurm, 2 at a time
#     sh batch_master.sh --status    say what is done, running, missing and why
set -eu
here=$(cd -- "$(dirname -- "$0")" && pwd)
exec {python} {jobs} "$here" "$@"
"""


def write_folder(args: argparse.Namespace, tasks: list[Task], batch: Batch, script: str) -> None:
    """Write everything `sh batch_master.sh` needs; the tasks' list last.

    Parameters
    ----------
    args : Namespace
        Flags of `add_slurm_flags`.
    tasks : list of Task
        Lines 0..N-1 of tasks.tsv.
    batch : Batch
        Content of batch.json.
    script : str
        Name of the generator, for the headers.
    """
    folder = args.out_dir
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    array = render_sbatch(
        batch,
        batch.name,
        "%A_%a.log",
        f"Run line $1 + $SLURM_ARRAY_TASK_ID of tasks.tsv. Written by {script}.",
        ARRAY_BODY.format(tasks=shlex.quote(str(folder / "tasks.tsv"))),
    )
    master = BATCH_MASTER.format(
        script=script,
        python=shlex.quote(sys.executable),
        jobs=shlex.quote(str(REPO_DIR / "slurm_jobs.py")),
    )
    write_atomically(folder / "array.sbatch", array)
    write_atomically(folder / "batch_master.sh", master)
    write_atomically(folder / "batch.json", json.dumps(asdict(batch), indent=1) + "\n")
    write_atomically(folder / "tasks.tsv", tasks_text(tasks))


def tasks_text(tasks: list[Task]) -> str:
    """Return the content of tasks.tsv."""
    return "".join(f"{i}\t{task.outputs}\t{task.command}\n" for i, task in enumerate(tasks))


def read_tasks(folder: Path) -> list[Task]:
    """Read tasks.tsv."""
    try:
        lines = (folder / "tasks.tsv").read_text().splitlines()
        return [Task(*line.split("\t")[1:]) for line in lines]
    except (FileNotFoundError, TypeError):
        raise UserError(
            f"{folder} must be a folder with tasks.tsv, got none that can be read; "
            f"run create_batch_array_sinbad.py or create_batch_array_sinbad_224.py"
        ) from None


def read_batch(folder: Path) -> Batch:
    """Read batch.json."""
    try:
        values = json.loads((folder / "batch.json").read_text())
        return Batch(**{field.name: values[field.name] for field in fields(Batch)})
    except (FileNotFoundError, ValueError, KeyError):
        raise UserError(
            f"{folder} must be a folder with batch.json, got none that can be read; "
            f"run the generator again"
        ) from None


def make_batch(args: argparse.Namespace, name: str, levels: list[int]) -> Batch:
    """Gather what batch_master.sh must know from the flags."""
    return Batch(
        name=name,
        sbatch_lines=sbatch_lines(args),
        setup=args.setup,
        throttle=args.throttle,
        max_array_size=args.max_array_size,
        mvtypes=expand_mvtypes(args.mvtype),
        version=args.version_name,
        results_dir=str(args.results_dir),
        levels=levels,
        reps=flatten(args.rep),
        sibling=str(args.out_dir.parent / args.then_ensemble) if args.then_ensemble else None,
        ensemble_out=str(args.ensemble_out) if args.ensemble_out else None,
    )
