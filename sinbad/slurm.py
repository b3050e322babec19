"""Stateless Slurm arrays: the list of tasks, the text for sbatch, submission, status, local run.

A task is done when its outputs exist, waiting or running when squeue shows its index under the job
name of its folder, else missing. Two submissions at once, or a kill between sbatch and the next
line, cost at most work done twice. Standard library only: this runs on login nodes.
"""

import argparse
import dataclasses
import hashlib
import itertools
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from sinbad import atomic, cli, errors, loco, score_tasks, settings

log = logging.getLogger(__name__)

TASK_PROGRAM = Path(__file__).resolve().parents[1] / "sinbad_single_layer.py"
FIXED_OPTIONS = ("array", "chdir", "job-name", "output", "parsable")  # of sbatch, set by `submit`

ARRAY = """\
#!/bin/bash
# Run one task: the command in line $SLURM_ARRAY_TASK_ID of tasks.tsv. batch_master.sh submits it.
#SBATCH --open-mode=append
{options}
# shellcheck disable=SC1090,SC1091  # the set-up lines may source files of the cluster
sinbad_command=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" tasks.tsv | cut -f 2)
[ -n "$sinbad_command" ] || {{ echo "error: $PWD/tasks.tsv has no such task"; exit 2; }}
echo "# $HOSTNAME, $(date): $sinbad_command"
cd {working_dir} || exit
{setup}
eval "$sinbad_command"
"""
BATCH_MASTER = """\
#!/bin/sh
# Submit the missing tasks of tasks.tsv and print the job id. Instead, --status prints what is done,
# running, missing and why; --local 2 runs what is missing here without Slurm, 2 tasks at a time.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
exec {program} --submit --out_dir "$here" --throttle={throttle} "$@"
"""


def array_parser(doc: str | None, defaults: settings.LevelDefaults, name: str) -> cli.ScriptParser:
    """Return the parser of a generator, with its levels' defaults and the name of its folder."""
    parser, count = cli.ScriptParser(doc), cli.int_at_least
    add, out_dir = parser.group("array").add_argument, cli.RUNS_DIR / name
    add("--out_dir", type=cli.path, default=out_dir, metavar="DIR", help="folder of the array")
    add("--group", choices=("none", "class"), default="none", help="class: one task per category")
    add("--reps_per_task", type=count(1), metavar="N", help="repetitions per task (default: all)")
    add("--status", action="store_true", help="print what is done, running, missing and why")
    add("--submit", action="store_true", help="submit what is missing, as batch_master.sh does")
    add("--local", type=count(1), metavar="N", help="run what is missing here, N tasks at a time")
    add, repeatable = parser.group("cluster").add_argument, {"action": "append", "metavar": "X"}
    for option in ("partition", "account", "time", "gres"):
        text = f"#SBATCH --{option}=X" + " (default: gpu:1; or none)" * (option == "gres")
        add(f"--{option}", type=f"{option}={{}}".format, dest="sbatch", help=text, **repeatable)
    add("--sbatch", help="#SBATCH --X, such as mem=16G or requeue; repeatable", **repeatable)
    add("--setup", help="shell line X before each task; repeatable", **repeatable)
    python = "interpreter of the tasks, as shell words (default: that of this script)"
    add("--python", default=shlex.quote(sys.executable), metavar="COMMAND", help=python)
    add("--throttle", type=count(0), default=0, metavar="N", help="tasks at once (default: all)")
    reps = range(defaults.n_reps)
    meaning = f"repetitions, as 3 or 0-99 (default: {cli.shorten_numbers(reps)})"
    rep, mvtype = {"default": [[*reps]], "help": meaning}, {"default": ["all"]}
    paths = ("mvtype", "data_dir", "results_dir", "version_name", "rep")
    cli.add_shared(parser, *paths, mvtype=mvtype, rep=rep)
    cli.add_settings(parser, ["crop_size_ratio"], crop_size_ratio=defaults.crop_ratios)
    cli.add_settings(parser, cli.TASK_FLAGS)
    return parser


def plan_tasks(
    args: argparse.Namespace, values: settings.Settings
) -> Iterator[tuple[str, list[score_tasks.ScoreTask]]]:
    """Split the work into tasks: a command that runs anywhere, and its files of scores."""
    present = [path.parent.name for path in args.data_dir.glob("*/train_data.npy")]
    mvtypes, reps = loco.choose_mvtypes(args.mvtype, present), cli.sorted_unique(args.rep)
    step = args.reps_per_task or len(reps)
    columns = mvtypes, values.pyramid_level, values.crop_size_ratio
    groups = [[[value] for value in column] for column in columns]
    if args.group == "class":
        categories = dict.fromkeys(loco.split_mvtype(mvtype)[0] for mvtype in mvtypes)
        groups = [[[m for m in mvtypes if loco.split_mvtype(m)[0] == c] for c in categories]]
        groups += [[values.pyramid_level], [values.crop_size_ratio]]
    groups.append([reps[i : i + step] for i in range(0, len(reps), step)])
    data_dir, results_dir = os.path.abspath(args.data_dir), os.path.abspath(args.results_dir)
    version = args.version_name
    paths = [f"--data_dir={data_dir}", f"--results_dir={results_dir}", f"--version_name={version}"]
    for names, levels, ratios, reps in itertools.product(*groups):
        task_values = dataclasses.replace(values, pyramid_level=levels, crop_size_ratio=ratios)
        flags = cli.flags_of(task_values, ("pyramid_level", "crop_size_ratio", *cli.TASK_FLAGS))
        flags += ["--rep", *cli.shorten_numbers(reps).split(","), *paths]
        command = f"{args.python} {shlex.join([str(TASK_PROGRAM), '--mvtype', *names, *flags])}"
        parts = itertools.product(names, levels, ratios, [values.seed], reps, [version])
        yield command, list(itertools.starmap(score_tasks.ScoreTask, parts))


def sbatch_lines(pairs: Iterable[str], device: str) -> str:
    """Return the #SBATCH lines of options NAME=VALUE or NAME; the last of a name counts."""
    lines: dict[str, str] = {}
    for pair in ("gres=gpu:1", *pairs):
        name, equals, value = pair.partition("=")
        if not re.fullmatch("[a-z][a-z-]*", name) or name in FIXED_OPTIONS or pair.splitlines()[1:]:
            rule = f"NAME=VALUE or NAME, one line, not {', '.join(FIXED_OPTIONS)}"
            raise errors.UserError(f"sbatch must be {rule}, got {pair!r}; see --help")
        lines[name] = f"#SBATCH --{name}{equals}{shlex.quote(value) if equals else ''}"
    if device == "cpu" or lines["gres"].endswith("=none"):
        del lines["gres"]
    return "\n".join(lines.values())


def generate(args: argparse.Namespace, script: str) -> None:
    """Write the folder of an array; the list of tasks last."""
    expected = values = cli.settings_of(args)
    if values.weights not in ("imagenet", "random"):
        path = Path(os.path.abspath(os.path.expanduser(values.weights)))
        values = dataclasses.replace(values, weights=str(path))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        expected = dataclasses.replace(values, weights=digest)
    folder, results_dir = os.path.abspath(args.out_dir), Path(os.path.abspath(args.results_dir))
    tasks, rows = list(plan_tasks(args, values)), []
    score_tasks.check_tasks([file for _, files in tasks for file in files], values)
    for command, files in tasks:
        for file in files:
            score_tasks.check_existing(file, results_dir, expected)
        rows.append([str(len(rows)), command, *(str(f.path(results_dir, values)) for f in files)])
    unfit = set("\t\r\n") & set("".join(itertools.chain(*rows))) | set("%\\") & set(folder)
    unfit |= set("#") & set(f"{args.results_dir}{args.version_name}")  # stands for a level
    if unfit:
        raise errors.UserError(
            "names and paths must be without tabs and line ends, out_dir without % and \\, "
            f"results_dir and version_name without #, got {''.join(unfit)!r}; rename or move them"
        )
    options, here = sbatch_lines(args.sbatch or (), values.device), shlex.quote(os.getcwd())
    array = ARRAY.format(options=options, working_dir=here, setup="\n".join(args.setup or ()))
    program = shlex.join([sys.executable, os.path.abspath(script)])
    master = BATCH_MASTER.format(program=program, throttle=args.throttle)
    lines = "".join("\t".join(row) + "\n" for row in rows)
    for name, text in (("array.sbatch", array), ("batch_master.sh", master), ("tasks.tsv", lines)):
        atomic.atomic_write(Path(folder, name), os.fsencode(text))
    log.info(f"{len(rows)} tasks; submit them: sh {shlex.quote(f'{folder}/batch_master.sh')}")


def read_outputs(path: Path) -> list[list[str]]:
    """Return the output files of each task of tasks.tsv; UserError if it is damaged."""
    *rows, rest = (line.split("\t") for line in os.fsdecode(path.read_bytes()).split("\n"))
    if rest != [""] or not rows or any(row[:1] != [str(i)] for i, row in enumerate(rows)):
        raise errors.UserError(
            f"{path} must hold lines of index, command and outputs, got others; generate it again"
        )
    return [outputs for _, _, *outputs in rows]


def ask_slurm(*words: str, folder: Path | None = None) -> str:
    """Run one of Slurm's commands and return what it prints."""
    # Without the user's own format and filters; else squeue cuts indices at 64 characters.
    variables = {name: text for name, text in os.environ.items() if not name.startswith("SQUEUE_")}
    command = ["env", "SLURM_BITSTR_LEN=0", *words]
    run = subprocess.run(command, cwd=folder, env=variables, capture_output=True)
    if run.returncode:
        reason = " ".join(os.fsdecode(run.stderr).split()) or f"exit status {run.returncode}"
        raise errors.UserError(f"could not run {words[0]} (is this a login node?): {reason}")
    return os.fsdecode(run.stdout)


def find_active(name: str) -> dict[int, str]:
    """Ask squeue for the tasks of jobs of a name that wait or run; return index -> state."""
    # Not with --array: it omits the last index of a waiting array like 0-20:4.
    listing = ask_slurm("squeue", "-h", f"-u{os.getuid()}", f"-n{name}", "-o%K|%T|%r")
    active: dict[int, str] = {}
    for indices, state, reason in re.findall(r"^([\d:,-]+)[^|\n]*\|(\w+)\|(.*)$", listing, re.M):
        text = f"waiting ({reason})" if state == "PENDING" else "running"
        for low, high, step in re.findall(r"(\d+)(?:-(\d+))?(?::(\d+))?", indices):
            active |= dict.fromkeys(range(int(low), int(high or low) + 1, int(step or 1)), text)
    return active


def group_tasks(outputs: list[list[str]], active: dict[int, str]) -> dict[str, list[int]]:
    """Return state -> tasks, done first, missing last; `active` are those that wait or run."""
    groups: dict[str, list[int]] = {state: [] for state in ("done", *active.values(), "missing")}
    for i, paths in enumerate(outputs):
        is_done = all(map(os.path.exists, paths))
        groups["done" if is_done else active.get(i, "missing")].append(i)
    return groups


def describe_failures(folder: Path, name: str, missing: list[int]) -> list[str]:
    """Return a line per reason why tasks failed, the last line of a task's newest log."""
    failed: dict[str, list[int]] = {}
    for i in missing:
        logs = sorted(folder.glob(f"logs/{name}_*_{i}.log"), key=os.path.getmtime)
        if logs:
            lines = logs[-1].read_text("utf-8", "replace").split("\n")[1:]  # after the command
            reasons = ["no error message in the log", *filter(str.strip, lines)]
            failed.setdefault(reasons[-1], []).append(i)
    return [
        f"{cli.shorten_numbers(tasks)} failed: {reason} (logs/{name}_*_{tasks[0]}.log)"
        for reason, tasks in failed.items()
    ]


def run_array(args: argparse.Namespace, script: str) -> int:
    """Do what the flags ask for; return the exit status. batch_master.sh will call `script`."""
    if not (args.status or args.local or args.submit):
        generate(args, script)
        return 0
    folder = Path(os.path.abspath(args.out_dir))
    outputs = read_outputs(folder / "tasks.tsv")
    content = os.fsencode(folder.resolve()) + (folder / "tasks.tsv").read_bytes()
    kind = "224" if settings.PIXEL_LEVEL in args.pyramid_level else "levels"
    name = f"sinbad_{kind}_{hashlib.sha256(content).hexdigest()[:8]}"
    active: dict[int, str] = {}
    try:
        active = find_active(name)
    except errors.UserError as error:
        if not (args.status or args.local):
            raise
        log.warning(f"{error}; tasks that wait or run in Slurm count as missing")
    groups = group_tasks(outputs, active)
    lines = [f"{len(i)} {state} {cli.shorten_numbers(i)}".strip() for state, i in groups.items()]
    if args.status:
        print("\n".join([*lines, *describe_failures(folder, name, groups["missing"])]))
        return int(bool(groups["missing"]))
    log.info(f"{len(outputs)} tasks of {folder}: {', '.join(lines)}")
    (folder / "logs").mkdir(exist_ok=True)
    if args.local:
        run_locally(folder, name, groups["missing"], args.local)
        missing = group_tasks(outputs, active)["missing"]
        for line in describe_failures(folder, name, missing):
            log.info(f"{line}; the same command runs them again")
        return int(bool(missing))
    if groups["missing"]:
        submit(folder, name, groups["missing"], args.throttle)
    return 0


def submit(folder: Path, name: str, missing: list[int], throttle: int) -> None:
    """Submit tasks as one array and print its job id."""
    size = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask_slurm("scontrol", "show", "config"), re.M)
    if size and missing[-1] >= int(size[1]):
        raise errors.UserError(
            f"an array must have at most {size[1]} tasks (MaxArraySize), got {missing[-1] + 1}; "
            "--group class and a larger --reps_per_task make fewer, --local needs no array"
        )
    array = f"--array={cli.shorten_numbers(missing)}{f'%{throttle}' if throttle else ''}"
    words = (f"--job-name={name}", f"--output=logs/{name}_%A_%a.log", array, "array.sbatch")
    answer = ask_slurm("sbatch", "--parsable", *words, folder=folder)
    jobs = re.findall(r"^(\d+)(?:;.*)?$", answer, re.M)
    if not jobs:
        raise errors.UserError(
            f"sbatch printed no job id, got {answer!r}; what squeue shows is not submitted again"
        )
    log.info(f"submitted {array}")
    print(jobs[-1], flush=True)


def run_locally(folder: Path, name: str, missing: list[int], n_parallel: int) -> None:
    """Run tasks on this machine, some at a time; an interrupt ends all of them."""
    task = f"SLURM_ARRAY_TASK_ID={{}} bash array.sbatch >logs/{name}_local_{{}}.log 2>&1 || true"
    words = ["xargs", f"-P{n_parallel}", "-I{}", "sh", "-c", f"echo task {{}} begins >&2; {task}"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    pool = subprocess.Popen(words, cwd=folder, stdin=subprocess.PIPE, start_new_session=True)
    try:
        pool.communicate("\n".join(map(str, missing)).encode())
    except KeyboardInterrupt:
        os.killpg(pool.pid, signal.SIGTERM)
        raise
