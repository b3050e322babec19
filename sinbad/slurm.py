"""A Slurm array that remembers nothing: the text for sbatch, submit, status, local run.

A task is done when its outputs are there, waiting or running when squeue shows its folder's job
name and its index, else missing. Two submissions at once, or a kill between sbatch and the next
line, cost at most work done twice. Standard library only: it runs on login nodes.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sinbad import datasets, flags
from sinbad.errors import UserError, say
from sinbad.files import write_whole

Item = TypeVar("Item")
Task = tuple[str, str]  # a line of tasks.tsv: outputs as a bash brace pattern, command
Alive = dict[int, tuple[str, str]]  # task -> id of its array's job, reason of one that waits or ""

TASK_PROGRAM = Path(__file__).resolve().parents[1] / "sinbad_single_layer.py"
ENSEMBLE_PROGRAM = TASK_PROGRAM.with_name("calc_anom_ensm.py")
OF_THE_TASKS = (flags.network_flags, flags.scoring_flags, flags.results_flags, flags.device_flags)
OF_SUBMISSION = ("throttle", "max_array_size", "then_ensemble", "ensemble_out", "dataset_dir")
OF_SBATCH = ("partition", "account", "qos", "gres", "mem", "cpus-per-task", "time", "exclude",
             "constraint", "mail-user")  # fmt: skip
DEFAULT_MAX_ARRAY_SIZE = 1001  # slurm.conf's own
UNFIT = re.compile("[\t\r\n\ud800-\udfff]")  # for tasks.tsv, which is UTF-8
SECONDS_BETWEEN_LOOKS = 0.1
SCORES = re.compile(
    r"(?P<version>.+_pyramid_lvl_)(?P<level>\d+)/rep_num_(?P<rep>\d+)/(?P<mvtype>[^/]+)/[^/]+"
)

ARRAY = """\
#!/bin/bash
# Run line $1 + $SLURM_ARRAY_TASK_ID of tasks.tsv, or the command $2. batch_master.sh submits it.
#SBATCH --open-mode=append
{options}
# The set-up lines may source files that only the cluster has.
# shellcheck disable=SC1090,SC1091

sinbad_task=$((${{1:-0}} + ${{SLURM_ARRAY_TASK_ID:-0}}))
sinbad_command=${{2:-$(awk -F '\\t' -v task="$sinbad_task" '$1 == task {{ print $3 }}' tasks.tsv)}}
if [ -z "$sinbad_command" ]; then
    echo "error: task must be one of $PWD/tasks.tsv, got $sinbad_task; generate it again" >&2
    exit 2
fi
echo "# $HOSTNAME, $(date): $sinbad_command"
set --
{setup}
eval "$sinbad_command"
"""

BATCH_MASTER = """\
#!/bin/sh
# Submit the unfinished tasks of tasks.tsv and print the job ids.
#
#     sh batch_master.sh             submit what is missing
#     sh batch_master.sh --status    say what is done, running, missing and why
#     sh batch_master.sh --local 2   run what is missing here without Slurm, 2 at a time
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
exec {program} --submit --out_dir "$here" {flags} "$@"
"""


# ---------------------------------------------------------------- numbers and patterns


def shorten_numbers(numbers: Iterable[int]) -> str:
    """Write numbers as runs, as sbatch --array has them: 0 1 2 7 -> "0-2,7"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def expand_numbers(text: str) -> list[int]:
    """Expand the array indices of squeue: "0-2,7%4" -> 0 1 2 7, "0-8:4" -> 0 4 8, "N/A" -> 0."""
    numbers: list[int] = []
    for run in text.replace("N/A", "0").partition("%")[0].split(","):
        form = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", run)
        if form is None:
            raise UserError(f"array indices of squeue must be as 0-2,7, got {text}; try again")
        numbers += range(int(form[1]), int(form[2] or form[1]) + 1, int(form[3] or 1))
    return numbers


def brace_pattern(values: Sequence[Any]) -> str:
    """Write values as bash does: 7 -> "7", 7 14 -> "{7,14}", 0 ... 99 -> "{0..99}"."""
    first, last = values[0], values[-1]
    if len(values) == 1:
        return str(first)
    if isinstance(first, int) and list(values) == list(range(first, last + 1)):
        return f"{{{first}..{last}}}"
    return "{" + ",".join(map(str, values)) + "}"


def expand_pattern(pattern: str) -> list[str]:
    """Expand a brace pattern into its paths, in bash's order."""
    choices: list[list[str]] = []
    for i, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        choices.append(part.split(",") if i % 2 else [part])
        if i % 2 and (run := re.fullmatch(r"(\d+)\.\.(\d+)", part)):
            choices[-1] = [str(number) for number in range(int(run[1]), int(run[2]) + 1)]
    return ["".join(parts) for parts in itertools.product(*choices)]


def group_by_value(texts: dict[Item, str]) -> dict[str, list[Item]]:
    """Return the keys that have the same text."""
    groups: dict[str, list[Item]] = {}
    for key, text in texts.items():
        groups.setdefault(text, []).append(key)
    return groups


# ---------------------------------------------------------------- flags


def absolute(path: Path | str) -> Path:
    """Make a path absolute; symbolic links stay, other machines may have them elsewhere."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def array_parser(
    description: str | None, settings: datasets.LevelSettings, out_dir: Path, sibling: str
) -> flags.ScriptParser:
    """Make the parser of a generator.

    Parameters
    ----------
    description : the script's docstring
    settings : the paper's, of the generator's levels: the defaults
    out_dir : default of the folder to write
    sibling : name of the other generator's folder, beside it
    """
    parser = flags.ScriptParser(description, [group() for group in OF_THE_TASKS])
    parser.set_defaults(num_workers=None)  # of the tasks' machine, not of this one
    add, above = parser.add_argument, flags.integer_from
    add("--data_dir", type=Path, default=datasets.DEFAULT_DATA_DIR, help="folder of the matrices")
    add("--seed", type=above(0), default=0, help="of the random directions")
    add("--mvtype", nargs="+", default=["all"], help="data sets, classes, loco, struct or all")
    add("--crop_size_ratio", nargs="+", type=flags.ratio_type, default=list(settings.crop_ratios),
        help="side of a crop, of the image's")  # fmt: skip
    add("--rep", nargs="+", type=flags.integer_ranges, default=[list(range(settings.n_reps))],
        help=f"repetitions, as 3 or 0-99 (default: 0 to {settings.n_reps - 1})")  # fmt: skip
    add("--group", choices=("none", "class"), default="none",
        help="none: a task is one data set, level and crop ratio, the most tasks at once; class: a "
        "task is a whole class in one pass, the least GPU time")  # fmt: skip
    add("--reps_per_task", type=above(1), metavar="N", help="repetitions in a task (default: all)")
    add("--out_dir", type=Path, default=out_dir, help="the folder to write")
    add("--status", action="store_true", help="say what is done, running, missing and why")
    add("--submit", action="store_true", help="submit what is missing, as batch_master.sh does")
    add("--local", type=above(1), metavar="N", help="run what is missing here, N at a time")
    add("--then_ensemble", type=lambda text: absolute(text) if "/" in text else Path(text),
        nargs="?", const=Path(sibling), metavar="SIBLING",
        help="let calc_anom_ensm.py follow when this and the other generator's folder are through;"
        f" a path, or a name beside --out_dir (if none is given: {sibling})")  # fmt: skip
    add("--ensemble_out", type=absolute, metavar="DIR",
        help="folder of its tables (default: `ensemble` beside the scores' folders)")  # fmt: skip
    add("--dataset_dir", type=absolute, default=str(datasets.DEFAULT_DATASET_DIR),
        help="images and masks, for its pictures and tables")  # fmt: skip
    add("--throttle", type=above(1), metavar="N", help="at most N tasks at a time")
    add("--max_array_size", type=above(1), metavar="N",
        help="tasks in one array (default: MaxArraySize of scontrol)")  # fmt: skip
    add("--setup", action="append", default=[], metavar="LINE",
        help="shell line before a task, as 'module load cuda'; may be repeated")  # fmt: skip
    for option in OF_SBATCH:
        add(f"--{option.split('-')[0]}", dest=option, metavar="TEXT", help=f"#SBATCH --{option}",
            default="gpu:1" if option == "gres" else None)  # fmt: skip
    add("--requeue", action=argparse.BooleanOptionalAction,
        help="start a preempted task again (default: the cluster's)")  # fmt: skip
    return parser


# ---------------------------------------------------------------- tasks


def plan_tasks(args: argparse.Namespace, levels: list[int]) -> list[Task]:
    """Split the work of a generator's flags into tasks."""
    present = [path.parent.name for path in args.data_dir.glob("*/train_data.npy")]
    mvtypes, reps = datasets.choose_mvtypes(args.mvtype, present), flags.flatten(args.rep)
    ratios, step = ratios_of(args, levels[0]), args.reps_per_task or len(reps)
    parts: list[list[Any]] = [[[one] for one in mvtypes], [[one] for one in levels], []]
    parts[2] = [{file: ratio} for file, ratio in ratios.items()]
    if args.group == "class":
        class_of = {mvtype: datasets.split_mvtype(mvtype)[0] for mvtype in mvtypes}
        parts = [list(group_by_value(class_of).values()), [levels], [ratios]]
    parts.append([reps[i : i + step] for i in range(0, len(reps), step)])
    return [plan_task(args, *share) for share in itertools.product(*parts)]


def ratios_of(args: argparse.Namespace, level: int) -> dict[str, float]:
    """Return the crop ratios by the files that they write."""
    grid = args.initial_res, args.crop_size_ratio, args.crop_num_edge
    return datasets.ratios_by_file(level, *grid)


def plan_task(
    args: argparse.Namespace,
    mvtypes: list[str],
    levels: list[int],
    ratios: dict[str, float],
    reps: list[int],
) -> Task:
    """Return a task; its command runs from any folder and holds only what is not the default."""
    words: list[object] = [sys.executable, TASK_PROGRAM, "--mvtype", *mvtypes]
    words += ["--pyramid_level", *levels, "--crop_size_ratio", *ratios.values()]
    words += ["--rep", *shorten_numbers(reps).split(","), f"--seed={args.seed}"]
    words.append(f"--data_dir={absolute(args.data_dir)}")
    for name, default in default_flags().items():
        value = getattr(args, name)
        if name == "results_dir" or (name == "weights" and value not in ("imagenet", "random")):
            value = absolute(value)
        if value is not None and value != default:
            words.append(f"--{name}" if value is True else f"--{name}={value}")
    command = shlex.join(map(str, words))
    where = absolute(args.results_dir), args.version_name
    folder = datasets.scores_folder(*where, *map(brace_pattern, (levels, reps, mvtypes)))
    outputs = f"{folder}/{brace_pattern(list(ratios))}"
    files = [f"{datasets.scores_folder(*where, *share)}/{file}"
             for share in itertools.product(levels, reps, mvtypes) for file in ratios]  # fmt: skip
    unfit = UNFIT.search(outputs + command) or "#" in outputs or expand_pattern(outputs) != files
    if unfit or any(name.startswith(("-", "@")) for name in mvtypes):
        raise UserError(
            "names and paths must be UTF-8 without braces, #, tabs and line ends, without commas "
            "where a task has several, and not begin with - or @, "
            f"got {outputs!r}; rename or choose others"
        )
    return outputs, command


def default_flags() -> dict[str, Any]:
    """Return the flags that are handed on to the tasks as they are, with their defaults."""
    return {k: v for group in OF_THE_TASKS for k, v in vars(group().parse_args([])).items()}


def check_finished(args: argparse.Namespace, tasks: list[Task], level: int) -> None:
    """Stop if an output is there that was made with other settings: it would count as done."""
    names = [*vars(flags.scoring_flags().parse_args([])), "seed", "net", "precision"]
    wanted: dict[str, Any] = {name: getattr(args, name) for name in names}
    paper = datasets.level_settings(level)
    wanted["n_projections"] = args.n_projections or paper.n_projections
    wanted["shrinkage_factor"] = args.shrinkage_factor or paper.shrinkage
    ratios = ratios_of(args, level)
    for path in [Path(path) for outputs, _ in tasks for path in expand_pattern(outputs)]:
        found = read_settings(path) if path.exists() else {}
        wanted["crop_size_ratio"] = ratios[path.name]
        if "weights_sha256" in found:  # the raw pixels' files have none
            wanted["weights_sha256"] = weights_sha256(args.weights, found["weights_sha256"])
        for name, value in wanted.items():
            if found.get(name, value) != value:
                raise UserError(
                    f"{path} was made with {name} {found[name]}, now {name} is {value}; choose "
                    "another --version_name or --results_dir, or remove it"
                )


def read_settings(path: Path) -> dict[str, Any]:
    """Read what a file of scores was made with, without numpy; {} of the authors' files."""
    try:
        with zipfile.ZipFile(path) as archive:
            if "run.npy" not in archive.namelist():
                return {}
            _, _, text = archive.read("run.npy").partition(b"\n")  # ends the header of a .npy file
        return json.loads(text.decode("utf-32-le")).get("settings", {})
    except (zipfile.BadZipFile, ValueError) as error:
        raise UserError(f"{path} must be a whole .npz file, got {error}; remove it") from None


@functools.cache
def weights_sha256(weights: str, found: str) -> str:
    """Return what a task will record of --weights, to compare with what was `found`."""
    if weights == "imagenet":  # not known before they are loaded: any file's may be theirs
        return found if found != "random" else "that of imagenet"
    return weights if weights == "random" else (
        hashlib.sha256(absolute(weights).read_bytes()).hexdigest())  # fmt: skip


def read_tasks(folder: Path) -> list[Task]:
    """Read tasks.tsv; it must be there, and a generator's."""
    path, rows = folder / "tasks.tsv", []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        rows = [row.split("\t") for row in path.read_bytes().decode("utf-8").split("\n")]
    tasks = [(row[1], row[2]) for i, row in enumerate(rows[:-1]) if row[0] == str(i)]
    if not tasks or rows[len(tasks) :] != [[""]]:
        raise UserError(
            f"{path} must hold whole lines of index, outputs and command, got none or others; write"
            " it with create_batch_array_sinbad.py or create_batch_array_sinbad_224.py"
        )
    return tasks


def is_done(task: Task) -> bool:
    """Tell whether all outputs of a task are there."""
    return all(os.path.exists(path.encode("utf-8")) for path in expand_pattern(task[0]))


# ---------------------------------------------------------------- the folder


def generate(args: argparse.Namespace, levels: list[int], script: Path) -> None:
    """Write the folder of a generator; the list of tasks last.

    Parameters
    ----------
    args : flags of `array_parser`
    levels : pyramid levels, all of the network or only the raw pixels'
    script : the generator, which batch_master.sh calls

    Raises
    ------
    UserError
        If a flag cannot stand in a script, or outputs are there that other settings made.
    """
    folder, tasks = absolute(args.out_dir), plan_tasks(args, levels)
    check_finished(args, tasks, levels[0])
    options = {name: getattr(args, name) for name in OF_SBATCH}
    if options["gres"] == "none" or args.device == "cpu":
        options["gres"] = None
    texts = [text for text in (*options.values(), *args.setup) if text is not None]
    if any(len(text.splitlines()) != 1 for text in texts) or set(str(folder)) & {"%", "\\"}:
        raise UserError(
            f"values for sbatch must be one line each, --out_dir without % and \\, got {texts} and "
            f"{folder}; give --setup once a line"
        )
    lines = [f"--{name}={shlex.quote(text)}" for name, text in options.items() if text is not None]
    lines += ["--mail-type=END,FAIL"] if options["mail-user"] else []
    if args.requeue is not None:
        lines.append("--requeue" if args.requeue else "--no-requeue")
    kept = {name: getattr(args, name) for name in OF_SUBMISSION}
    flags_kept = [f"--{name}={value}" for name, value in kept.items() if value is not None]
    header = "\n".join(f"#SBATCH {line}" for line in lines)
    files = {
        "array.sbatch": ARRAY.format(options=header, setup="\n".join(args.setup)),
        "batch_master.sh": BATCH_MASTER.format(
            program=shlex.join([sys.executable, str(script)]), flags=shlex.join(flags_kept)
        ),
        "tasks.tsv": "".join(f"{i}\t{task[0]}\t{task[1]}\n" for i, task in enumerate(tasks)),
    }
    for name, text in files.items():
        write_whole(folder / name, text)
    say(f"{len(tasks)} tasks; submit them: sh {shlex.quote(str(folder / 'batch_master.sh'))}")


def run_array(args: argparse.Namespace, levels: list[int], script: str) -> int:
    """Do what a generator's flags ask for; return the exit status."""
    folder = absolute(args.out_dir)
    if args.status:
        return print_status(folder, args)
    if args.local:
        return run_locally(folder, args)
    if args.submit:
        return submit(folder, args)
    generate(args, levels, Path(script).resolve())
    return 0


# ---------------------------------------------------------------- Slurm


def ask_slurm(words: list[str], folder: Path | None = None) -> str:
    """Run one of Slurm's commands and return what it prints.

    The person's own format and filters of squeue (SQUEUE_...) do not count.
    """
    own = {name: text for name, text in os.environ.items() if not name.startswith("SQUEUE_")}
    own["SLURM_BITSTR_LEN"] = "0"  # else squeue cuts an array's indices at 64 characters
    try:
        run = subprocess.run(words, cwd=folder, env=own, capture_output=True, encoding="utf-8",
                             errors="replace", check=False)  # fmt: skip
    except FileNotFoundError:
        raise UserError(
            f"Slurm's {words[0]} must be on the PATH, got none; go to a login node, or run the "
            "tasks here without Slurm: sh batch_master.sh --local 2"
        ) from None
    if run.returncode:
        raise UserError(
            f"`{shlex.join(words)}` must succeed, got exit status {run.returncode}: "
            f"{' '.join(run.stderr.split())}; what was submitted before is kept, try again"
        )
    return run.stdout


def job_name(*folders: Path) -> str:
    """Return the name of the jobs of folders and of the tasks that are in them now."""
    digest = hashlib.sha256()
    for folder in sorted(path.resolve() for path in folders):
        digest.update(os.fsencode(folder) + b"\0" + (folder / "tasks.tsv").read_bytes())
    return f"sinbad_{digest.hexdigest()[:8]}"


def find_alive(name: str, needed: bool) -> Alive:
    """Ask squeue for the tasks that wait or run of the jobs `name`+<offset>, or `name` alone.

    If they are not `needed`, a Slurm that does not answer has none.
    """
    # Not with --array: it leaves out the last index of a waiting array like 0-20:4.
    words = ["squeue", "--noheader", f"--user={os.getuid()}", "--format=%F|%K|%T|%j|%r"]
    alive: Alive = {}
    try:
        lines = ask_slurm(words).splitlines()
    except UserError as error:
        if needed:
            raise
        say(f"note: {error}")
        return {}
    for line in lines:
        if form := re.fullmatch(rf"(\d+)\|(.*)\|(\w+)\|{name}(?:\+(\d+))?\|(.*)", line):
            job, indices, state, offset, reason = form.groups()
            for index in expand_numbers(indices):
                alive[int(offset or 0) + index] = job, reason if state == "PENDING" else ""
    return alive


def sbatch(words: list[str], folder: Path) -> str:
    """Submit from the folder; print and return the job's id, whatever else sbatch prints."""
    answer = ask_slurm(["sbatch", "--parsable", *words], folder)
    ids = re.findall(r"^(\d+)(?:;.*)?$", answer, re.MULTILINE)
    if not ids:
        raise UserError(
            f"sbatch --parsable must print a job's id, got {answer!r}; look at squeue --me, what "
            "is there will not be submitted again"
        )
    print(ids[-1], flush=True)
    return ids[-1]


def array_size(args: argparse.Namespace) -> int:
    """Return how many tasks an array may have; 0 where the cluster has no arrays."""
    if args.max_array_size:
        return args.max_array_size
    config = ask_slurm(["scontrol", "show", "config"])
    form = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    return int(form[1]) if form else DEFAULT_MAX_ARRAY_SIZE


# ---------------------------------------------------------------- states


def look(folder: Path, tasks: list[Task], needed: bool = True) -> tuple[Alive, list[int]]:
    """Return the tasks that wait or run, and those that are missing; Slurm is asked if need be."""
    if all(map(is_done, tasks)):
        return {}, []
    alive = find_alive(job_name(folder), needed)
    unfinished = [i for i, task in enumerate(tasks) if not is_done(task)]
    return (
        {i: alive[i] for i in unfinished if i in alive},
        [i for i in unfinished if i not in alive],
    )


def begin(folder: Path, tasks: list[Task], alive: Alive, missing: list[int]) -> None:
    """Say how many tasks are in which state; make the folder of the logs."""
    (folder / "logs").mkdir(exist_ok=True)
    n_waiting = sum(bool(reason) for _, reason in alive.values())
    waiting = f" ({n_waiting} of them waiting)" if n_waiting else ""
    n_done = len(tasks) - len(alive) - len(missing)
    say(f"{len(tasks)} tasks: {n_done} done, {len(alive)} running{waiting}, {len(missing)} missing;"
        f" folder {folder}")  # fmt: skip


def why_failed(folder: Path, task: int, command: str) -> tuple[str, Path] | None:
    """Return the last line of a task's newest log, and its path; None if it never ran."""
    logs = [path for path in (folder / "logs").glob("*_*.log")
            if sum(map(int, path.stem.rpartition("_")[2].split("+"))) == task]  # fmt: skip
    for log in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True):
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        if lines and lines[0].endswith(command):  # of this list of tasks
            return lines[-1] if len(lines) > 1 else "ended without a word", log
    return None


def print_status(folder: Path, args: argparse.Namespace) -> int:
    """Print what is done, running, missing and why; return 1 if any is missing."""
    tasks = read_tasks(folder)
    alive, missing = look(folder, tasks, needed=False)
    done = set(range(len(tasks))) - {*alive, *missing}
    print(f"{'state':<10}{'tasks':>6}  which")
    for state, numbers in (("done", done), ("running", alive), ("missing", missing)):
        print(f"{state:<10}{len(numbers):>6}  {shorten_numbers(numbers)}".rstrip())
    reasons = {i: reason for i, (_, reason) in alive.items() if reason}
    for reason, numbers in group_by_value(reasons).items():
        print(f"{shorten_numbers(numbers)} of the running wait: {reason}")
    found = {i: why_failed(folder, i, tasks[i][1]) for i in missing}
    logs = {i: own for i, own in found.items() if own is not None}
    for words, numbers in group_by_value({i: own[0] for i, own in logs.items()}).items():
        print(f"{shorten_numbers(numbers)} failed: {words} ({logs[numbers[0]][1]})")
    if args.then_ensemble:
        print(f"ensemble  {plan_ensemble(folder, args, needed=False).state or 'missing'}")
    return int(bool(missing))


# ---------------------------------------------------------------- submit, run


def submit(folder: Path, args: argparse.Namespace) -> int:
    """Submit what is missing, then the ensemble if it was asked for.

    With a throttle an array follows those before it, so that the limit holds for all of them.
    """
    tasks = read_tasks(folder)
    alive, missing = look(folder, tasks)
    begin(folder, tasks, alive, missing)
    before = list(dict.fromkeys(job for job, _ in alive.values()))
    limit = f"%{args.throttle}" if args.throttle else ""
    size = array_size(args) if missing else 1
    for first in range(0, max(missing, default=-1) + 1, size or 1):
        part = shorten_numbers(i - first for i in missing if first <= i < first + (size or 1))
        if not part:
            continue
        words = [f"--job-name={job_name(folder)}+{first}"]
        words.append(f"--output=logs/%A_{first}{'+%a' if size else ''}.log")
        words += [f"--array={part}{limit}"] if size else []
        words += [f"--dependency=afterany:{':'.join(before)}"] if limit and before else []
        before = [sbatch([*words, "array.sbatch", str(first)], folder)]
        say(f"submitted --array={part}{limit} as job {before[0]}, of the tasks from {first}")
    if args.then_ensemble:
        submit_ensemble(folder, args, replace=bool(missing))
    return 0


class Ensemble(NamedTuple):
    """What holds an ensemble up ("" if nothing does), its command, the jobs it has to wait for."""

    state: str
    command: str = ""
    after: tuple[str, ...] = ()
    job_name: str = ""


def plan_ensemble(folder: Path, args: argparse.Namespace, needed: bool = True) -> Ensemble:
    """Plan the ensemble of this folder's and its sibling's scores.

    It is done if its tables are newer than all scores of both folders.
    """
    sibling = folder.parent / args.then_ensemble
    parts: dict[bool, dict[str, list[str]]] = {}
    after, paths = [], []
    for one in (folder, sibling):
        if not (one / "tasks.tsv").exists():
            return Ensemble(f"waits for {one}, which has not been generated yet")
        tasks = read_tasks(one)
        alive, missing = look(one, tasks, needed)
        if missing:
            command = f"sh {shlex.quote(f'{one}/batch_master.sh')}"
            return Ensemble(f"waits for {len(missing)} missing tasks of {one}; next: {command}")
        after += dict.fromkeys(job for job, _ in alive.values())
        own = [path for outputs, _ in tasks for path in expand_pattern(outputs)]
        found = [form.groupdict() for form in map(SCORES.fullmatch, own) if form]
        part = {name: list(dict.fromkeys(one[name] for one in found)) for name in found[0]}
        parts[part["level"] == [str(datasets.PIXEL_LEVEL)]] = part
        paths += own
    if len(parts) != 2:
        raise UserError(
            f"--then_ensemble must name the folder of the other generator, got {sibling}; write it"
        )
    net, raw = parts[False], parts[True]
    out = args.ensemble_out or Path(net["version"][0]).parent / "ensemble"
    words = [sys.executable, ENSEMBLE_PROGRAM, "--mvtype", *net["mvtype"]]
    words += ["--pyramid_level", *net["level"], "--rep", *net["rep"], f"--out={out}"]
    words += [f"--version={net['version'][0]}#", f"--version_224={raw['version'][0]}#"]
    words += [f"--rep_num_224={len(raw['rep'])}", f"--dataset_dir={absolute(args.dataset_dir)}"]
    command, name = shlex.join(map(str, words)), f"{job_name(folder, sibling)}_ensemble"
    newest = max((path.stat().st_mtime for path in out.glob("scores*.csv")), default=0.0)
    if not after and newest >= max(map(os.path.getmtime, paths)):
        return Ensemble("done: its tables are newer than all scores")
    waiting = [job for job, _ in find_alive(name, needed).values()]
    state = f"submitted as job {', '.join(waiting)}" if waiting else ""
    return Ensemble(state, command, tuple(after), name)


def submit_ensemble(folder: Path, args: argparse.Namespace, replace: bool) -> None:
    """Submit the ensemble after both folders' arrays; `replace` one that waits for less."""
    plan = plan_ensemble(folder, args)
    if plan.state and not (replace and plan.command):
        say(f"ensemble {plan.state}")
        return
    if plan.state:
        ask_slurm(["scancel", f"--name={plan.job_name}"])
    words = [f"--job-name={plan.job_name}", "--output=logs/ensemble_%j.log"]
    words += [f"--dependency=afterany:{':'.join(plan.after)}"] if plan.after else []
    job = sbatch([*words, "array.sbatch", "0", plan.command], folder)
    say(f"submitted the ensemble as job {job}, after {', '.join(plan.after) or 'nothing'}")


def run_locally(folder: Path, args: argparse.Namespace) -> int:
    """Run what is missing here, some at a time, then the ensemble; an interrupt ends all of it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tasks, failed = read_tasks(folder), []
    alive, waiting = look(folder, tasks, needed=False)
    begin(folder, tasks, alive, waiting)
    running: dict[int, subprocess.Popen[bytes]] = {}
    try:
        with flags.Progress(len(waiting), "tasks", "task") as bar:
            while waiting or running:
                while waiting and len(running) < args.local:
                    task = waiting.pop(0)
                    running[task] = start(folder, f"local_{task}", str(task))
                time.sleep(SECONDS_BETWEEN_LOOKS)
                for task in [i for i, process in running.items() if process.poll() is not None]:
                    running.pop(task)
                    if not is_done(tasks[task]):
                        failed.append(task)
                        words, log = why_failed(folder, task, tasks[task][1]) or ("no log", folder)
                        say(f"task {task} failed: {words} ({log})")
                    bar.update()
        if failed:
            say(f"tasks {shorten_numbers(failed)} failed; the same command runs them again")
        elif args.then_ensemble:
            plan = plan_ensemble(folder, args, needed=False)
            state = plan.state
            if not state:
                running[0] = start(folder, "ensemble_local", "0", plan.command)
                failed = [0] if running[0].wait() else []
                state = f"{'failed' if failed else 'done'}, see {folder}/logs/ensemble_local.log"
            say(f"ensemble {state}")
    finally:
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    return int(bool(failed))


def start(folder: Path, log: str, *words: str) -> subprocess.Popen[bytes]:
    """Start array.sbatch here, in a process group of its own."""
    with (folder / "logs" / f"{log}.log").open("wb") as stream:
        return subprocess.Popen(
            ["bash", "array.sbatch", *words], cwd=folder, stdin=subprocess.DEVNULL, stdout=stream,
            stderr=subprocess.STDOUT, env={**os.environ, "SLURM_ARRAY_TASK_ID": "0"},
            start_new_session=True,
        )  # fmt: skip
