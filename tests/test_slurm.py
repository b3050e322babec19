"""The array generators: what they write, what they submit, and how the tasks run without Slurm."""

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from slurm_stub import (
    assert_whole_results,
    batch_master,
    commands,
    process_of,
    states,
    stub_batch,
    wait_until,
)

import create_batch_array_sinbad as backbone
import create_batch_array_sinbad_224 as pixels
import sinbad_single_layer
from sinbad import cli, errors, settings, slurm

REPO = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    ("generator", "flags", "n_tasks", "n_outputs", "words"),
    [
        (backbone, "", 10 * 2 * 4, 1, "--pyramid_level 7 --crop_size_ratio 0.25"),
        (pixels, "", 10, 100, "--rep 0-99"),
        (pixels, "--reps_per_task 30", 40, 30, "--rep 0-29"),
        (backbone, "--group class", 5, 16, "--pyramid_level 7 14 --crop_size_ratio 0.25 0.5"),
        (backbone, "--mvtype pushpins --rep 0-2 5 --reps_per_task 4", 16, 4, "--rep 0-2 5"),
    ],
)
def test_tasks_share_the_papers_work(
    tmp_path: Path, generator: ModuleType, flags: str, n_tasks: int, n_outputs: int, words: str
) -> None:
    generator.main(["--out_dir", str(tmp_path), *flags.split()])
    outputs = slurm.read_outputs(tmp_path / "tasks.tsv")
    assert (len(outputs), len(outputs[0])) == (n_tasks, n_outputs)
    paths = [path for task in outputs for path in task]
    assert len(set(paths)) == len(paths)
    assert f"{words} " in f"{commands(tmp_path)[0]} "
    assert "pyramid_lvl_224" in paths[0] or paths[0].endswith(
        "sinbad_runs/results/ver1_pyramid_lvl_7/rep_num_0/"
        f"{Path(paths[0]).parent.name}/16_crop_anom_maps.npz"
    )


def test_a_command_computes_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "some weights.pth").touch()
    flags = ["--weights", str(tmp_path / "some weights.pth"), "--net", "resnet18", "--official"]
    flags += ["--seed", "3", "--shrinkage_factor", ".2", "--device", "cpu", "--rep", "0", "2"]
    python = "apptainer exec --nv 'sin bad.sif' python"
    folder = tmp_path / "a b"
    backbone.main(["--out_dir", str(folder), "--group", "class", "--python", python, *flags])
    for command in commands(folder):
        assert command.startswith(f"{python} {REPO}/sinbad_single_layer.py ")
        args = sinbad_single_layer.parse_args(shlex.split(command)[6:])
        levels = ["--pyramid_level", "7", "14", "--crop_size_ratio", ".25", ".5", ".7", ".99"]
        expected = sinbad_single_layer.parse_args(["--mvtype", "all", *levels, *flags])
        assert cli.settings_of(args) == cli.settings_of(expected)
        assert args.rep == expected.rep
        assert args.data_dir == REPO.parent / "dataset_loco/data_matrices"
        assert args.results_dir == REPO.parent / "sinbad_runs/results"


def test_categories_of_the_data_belong_to_all(tmp_path: Path) -> None:
    for name in ("toy_loco", "toy_struct"):
        (tmp_path / "m" / name).mkdir(parents=True)
        (tmp_path / "m" / name / "train_data.npy").touch()
    pixels.main(["--data_dir", str(tmp_path / "m"), "--out_dir", str(tmp_path)])
    names = {
        Path(path).parent.name
        for task in slurm.read_outputs(tmp_path / "tasks.tsv")
        for path in task
    }
    assert names == {"toy_loco", "toy_struct"}


def array_lines(folder: Path, *flags: str) -> list[str]:
    """Generate an array and return the lines of its script for Slurm."""
    backbone.main(["--mvtype", "pushpins_loco", "--out_dir", str(folder), *flags])
    return (folder / "array.sbatch").read_text().splitlines()


def test_flags_of_the_cluster(tmp_path: Path) -> None:
    site = tmp_path / "site.txt"
    site.write_text(
        "# our cluster\n--partition gpu\n--time=02:00:00\n--throttle 4\n--sbatch requeue\n"
        "--sbatch mem=16G\n--setup 'module load cuda ; true # quietly'\n--setup 'source activate'\n"
    )
    lines = array_lines(tmp_path)
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert options == ["#SBATCH --open-mode=append", "#SBATCH --gres=gpu:1"]
    flags = ["--sbatch", "mem=32G", "--account", "a b", "--gres", "gpu:a100:2"]
    lines = array_lines(tmp_path, f"@{site}", *flags)
    expected = {"partition=gpu", "time=02:00:00", "requeue", "mem=32G", "account='a b'"}
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert {line[10:] for line in options[1:]} == {*expected, "gres=gpu:a100:2"}
    i = lines.index("module load cuda ; true # quietly")
    assert lines[i + 1] == "source activate"
    assert "--throttle=4" in (tmp_path / "batch_master.sh").read_text()
    for without_gpu in (["--gres", "none"], ["--device", "cpu"]):
        assert not any("gres" in line for line in array_lines(tmp_path, *without_gpu))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crop_size_ratio", ".5", ".33"], "crop_size_ratio must .* both write 9_crop"),
        (["--mvtype", "nothing"], "mvtype must be"),
        (["--mvtype", "-x_loco"], "expected at least one argument"),
        (["--mvtype", "a\tb_loco"], r"must be without tabs.*, got '\\t'"),
        (["--results_dir", "a\nb"], r"must be without tabs.*, got '\\n'"),
        (["--version_name", "run#2"], "version_name without #, got '#'"),
        (["--out_dir", "100%"], "out_dir without % and .*, got '%'"),
        (["--out_dir", "a\\b"], "out_dir without % and"),
        (["--throttle", "-1"], "throttle: must be a whole number from 0, got -1"),
        (["--precision", "fp8"], "precision: must be one of fp32, tf32, bf16, got fp8"),
        (["--account", "a\nb"], r"sbatch must be .* one line, .* got 'account=a\\nb'"),
        (["--sbatch", "job-name=x"], "sbatch must be .* not array, .*, got 'job-name=x'"),
        (["--sbatch", "array=0-9"], "sbatch must be .* not array, .*, got 'array=0-9'"),
        (["--sbatch=--mem=2G"], "sbatch must be .*, got '--mem=2G'"),
        (["--weights", "missing.pth"], "missing.pth: No such file"),
        (["@missing.txt"], "missing.txt: No such file"),
        (["--pyramid_level", "7", "224"], "pyramid_level must be of the backbone, got 224"),
        (["--status"], "tasks.tsv: No such file"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        errors.run_script(backbone.main, ["--out_dir", str(tmp_path / "new"), *flags])
    assert end.value.code == errors.EXIT_USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^error: .*{message}", line), line
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- outputs of other settings

LEVEL_7 = {"crop_size_ratio": 0.5, "weights_sha256": "0" * 64, "compile": False}
CHANGES = [
    (generator, name)
    for generator, level, more in ((backbone, 7, LEVEL_7), (pixels, 224, {}))
    for name in settings.Settings().recorded(level) | more
]


def existing_output(root: Path, generator: ModuleType, *flags: str) -> tuple[list[str], Path]:
    """Generate an array; return the flags that do it again and its last output."""
    flags = ("--out_dir", str(root), "--results_dir", str(root / "r"), *flags)
    flags += ("--mvtype", "pushpins_loco", "--rep", "0-2", "--crop_size_ratio", ".5")
    generator.main([*flags])
    path = Path(slurm.read_outputs(root / "tasks.tsv")[-1][-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    return [*flags], path


@pytest.mark.parametrize(("generator", "name"), CHANGES)
def test_outputs_of_other_settings_do_not_count_as_done(
    tmp_path: Path, generator: ModuleType, name: str
) -> None:
    flags, path = existing_output(tmp_path, generator)
    record = settings.Settings().recorded(7 if generator is backbone else 224)
    record |= {"mvtype": "pushpins_loco", "crop_size_ratio": 0.5}
    if generator is backbone:
        record["weights_sha256"] = "0" * 64
    np.savez(path, run=json.dumps({"settings": record}))
    generator.main(flags)
    change = {"weights_sha256": "random", "compile": True, "net": "other"}.get(name, 0.4)
    np.savez(path, run=json.dumps({"settings": {**record, name: change}}))
    message = f"{path} was computed with {name} {change}, now {name} is .*; choose another"
    with pytest.raises(errors.UserError, match=message):
        generator.main(flags)
    generator.main([*flags, "--version_name", "ver2"])
    path.write_bytes(b"PK\3\4 cut")
    with pytest.raises(errors.UserError, match=f"could not read {path}: .*; remove it"):
        generator.main(flags)
    np.savez(path, scores=np.ones(3))  # as the authors' files: no record
    generator.main(flags)


@pytest.mark.parametrize("recorded", ["random", "a", "b"])
@pytest.mark.parametrize("weights", ["random", "a", "b"])
def test_outputs_of_other_weights_do_not_count_as_done(
    tmp_path: Path, recorded: str, weights: str
) -> None:
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in "ab"}
    digests["random"] = "random"
    for name in "ab":
        (tmp_path / name).write_text(name)
    weights_flag = "random" if weights == "random" else str(tmp_path / weights)
    flags, path = existing_output(tmp_path, backbone, "--weights", weights_flag, "--compile")
    record = {"net": "wide_resnet50_2", "weights_sha256": digests[recorded], "compile": True}
    np.savez(path, run=json.dumps({"settings": record}))
    message = f"{digests[recorded]}, now .* {digests[weights]};"
    is_error = pytest.raises(errors.UserError, match=message)
    with contextlib.nullcontext() if recorded == weights else is_error:
        backbone.main(flags)


# ---------------------------------------------------------------- the scripts themselves


def test_generators_start_at_once_and_without_torch() -> None:
    code = "import sys, create_batch_array_sinbad, create_batch_array_sinbad_224 as b; "
    code += "b.slurm; print(*{'torch', 'numpy', 'tqdm'} & {*sys.modules})"
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True)
        seconds.append(time.monotonic() - started)
        assert (run.returncode, run.stdout) == (0, b"\n")
    assert min(seconds) < 0.6  # 0.1 s where nothing else runs


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_shellcheck_clean(tmp_path: Path) -> None:
    folder = tmp_path / "with space's"
    array_lines(folder, "--setup", "source /x/activate", "--sbatch", "exclude=n[1-3]")
    scripts = [folder / "array.sbatch", folder / "batch_master.sh"]
    run = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert (run.stdout, run.returncode) == ("", 0)


@pytest.mark.parametrize(
    "damage", [lambda t: t[:-3], lambda t: b"\xff\xfe\0", lambda t: b"", lambda t: b"1" + t[1:]]
)
def test_a_damaged_list_is_one_line_and_repaired(tmp_path: Path, damage: "type[bytes]") -> None:
    folder = stub_batch(tmp_path, 3, 0)
    path = folder / "tasks.tsv"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    for flags in (["--status"], ["--local", "1"], []):
        run = batch_master(folder, *flags)
        assert run.returncode == errors.EXIT_USER_ERROR
        (line,) = run.stderr.splitlines()
        assert line.startswith(f"error: {path} must hold lines of index, command and outputs")
    stub_batch(tmp_path, 3, 0)
    assert path.read_bytes() == whole


# ---------------------------------------------------------------- submission, with stand-ins


def stand_in(folder: Path, name: str, script: str) -> None:
    """Put one of Slurm's commands on the PATH; it notes its arguments in `folder`/calls."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "{name} $*" >>"{folder}/calls"\n{script}\n')
    path.chmod(0o755)


@pytest.fixture
def slurm_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder of stand-ins on the PATH: no jobs, arrays of 1001, job 4711 in a banner."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_in(folder, "squeue", 'echo "*** Welcome | to | the cluster ***"')
    stand_in(folder, "scontrol", 'echo "MaxArraySize            = 1001"')
    stand_in(folder, "sbatch", 'echo "*** Quota: 40 % used. ***"; echo "4711;cluster"; echo Bye.')
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def sbatch_calls(slurm_commands: Path) -> list[str]:
    """Return the arguments of the calls of sbatch."""
    lines = (slurm_commands / "calls").read_text().splitlines()
    return [line for line in lines if line.startswith("sbatch")]


def test_only_the_job_id_is_printed(slurm_commands: Path, tmp_path: Path) -> None:
    folder = stub_batch(tmp_path, 3, 0, "--throttle", "2")
    assert batch_master(folder).stdout == "4711\n"
    (call,) = sbatch_calls(slurm_commands)
    assert call.endswith("--array=0-2%2 array.sbatch")
    name = re.search(r"--job-name=(sinbad_224_[0-9a-f]{8}) --output=logs/\1_%A_%a.log", call)[1]
    assert not call.startswith(name)
    for indices, state, expected in (
        ("0-2%2", "PENDING", {"waiting": "(Resources) 0-2"}),
        ("0,2", "RUNNING", {"running": "0,2", "missing": "1"}),
        ("0-2:2", "COMPLETING", {"running": "0,2", "missing": "1"}),
    ):
        stand_in(slurm_commands, "squeue", f'echo Hello; echo "{indices}|{state}|Resources"')
        assert states(folder) == expected
    batch_master(folder)
    assert sbatch_calls(slurm_commands)[-1].endswith("--array=1%2 array.sbatch")


@pytest.mark.parametrize(
    ("name", "script", "message"),
    [
        ("sbatch", "exit 0", "sbatch printed no job id, got ''; what squeue shows"),
        ("sbatch", "echo no >&2; exit 1", "could not run sbatch (is this a login node?): no"),
        ("squeue", "echo Unable >&2; echo now >&2; exit 1", "could not run squeue .*: Unable now"),
        ("scontrol", "exit 3", "could not run scontrol .*: exit status 3"),
        ("scontrol", 'echo "MaxArraySize = 2"', "at most 2 tasks .* got 3; --group class and"),
        ("scontrol", 'echo "MaxArraySize = 0"', "at most 0 tasks .* --local needs no array"),
    ],
)
def test_a_submission_that_fails_is_one_line(
    slurm_commands: Path, tmp_path: Path, name: str, script: str, message: str
) -> None:
    stand_in(slurm_commands, name, script)
    folder = stub_batch(tmp_path, 3, 0)
    run = batch_master(folder)
    assert (run.returncode, run.stdout) == (errors.EXIT_USER_ERROR, "")
    pattern = message.replace("(is", r"\(is").replace("?)", r"\?\)")
    assert re.search(f"^error: .*{pattern}", run.stderr, re.M), run.stderr
    assert len(sbatch_calls(slurm_commands)) == (name == "sbatch")
    assert batch_master(folder, "--local", "2").returncode == 0  # needs no Slurm
    assert_whole_results(folder)


# ---------------------------------------------------------------- without Slurm


def test_local_runs_resume_and_say_why_a_task_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stub_batch(tmp_path / "it's mine Größe 大", 5, 0.1)
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setenv("STUB_FAILS", "3")
    run = batch_master(folder, "--local", "2")
    assert run.returncode == 1
    reason = "3 failed: error: rep must be another, got it; this line is the reason"
    assert re.search(f"{reason} .*; the same command runs them again", run.stderr)
    status = batch_master(folder, "--status")
    assert status.returncode == 1
    assert status.stdout.startswith(f"4 done 0-2,4\n1 missing 3\n{reason} (logs/sinbad_224_")
    monkeypatch.delenv("STUB_FAILS")
    assert "5 tasks of" in batch_master(folder, "--local", "2").stderr
    status = batch_master(folder, "--status")
    assert (status.returncode, status.stdout) == (0, "5 done 0-4\n0 missing\n")
    assert_whole_results(folder)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_local_tasks_end_with_an_interrupt(tmp_path: Path, end: signal.Signals) -> None:
    folder = stub_batch(tmp_path, 3, 30)
    run = subprocess.Popen(
        ["sh", "batch_master.sh", "--local", "2"],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(end, signal.SIG_DFL),  # a background job ignores SIGINT
    )
    wait_until(lambda: all(process_of(i, folder) for i in (0, 1)), 20, "two local tasks")
    run.send_signal(end)
    assert "interrupted; run the same command again" in run.communicate()[1]
    wait_until(lambda: not any(process_of(i, folder) for i in (0, 1, 2)), 5, "their end")
    status = batch_master(folder, "--status").stdout
    assert status.startswith("0 done\n3 missing 0-2\n0-1 failed: no error message in the log (")


def test_a_moved_folder_runs_its_own_tasks(tmp_path: Path) -> None:
    stub_batch(tmp_path, 3, 0, "--setup", "cd /").rename(tmp_path / "moved")
    stub_batch(tmp_path, 3, 0, "--version_name", "other")  # at the old path
    assert batch_master(tmp_path / "moved", "--local", "2").returncode == 0
    assert_whole_results(tmp_path / "moved")
    assert not list(tmp_path.glob("results/other*"))


@pytest.mark.parametrize("name", ["it's mine_loco", "$(touch x)_loco", "名前_struct", "a;b_loco"])
def test_names_with_characters_of_the_shell(tmp_path: Path, name: str) -> None:
    folder = stub_batch(tmp_path, 1, 0, "--mvtype", name)
    assert batch_master(folder, "--local", "1").returncode == 0
    assert_whole_results(folder)
    assert Path(slurm.read_outputs(folder / "tasks.tsv")[0][0]).parent.name == name


def test_setup_and_python_are_shell_text_of_the_folder_they_were_typed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "env.sh").write_text("INTERPRETER=./python\n")
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    folder = stub_batch(tmp_path, 1, 0, "--setup", ". ./env.sh", "--python", "env $INTERPRETER")
    assert batch_master(folder, "--local", "1").returncode == 0
    assert_whole_results(folder)
