"""The array generators: what they write, what they submit, and how the tasks run without Slurm."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import slurm_stub as stub

import create_batch_array_sinbad as backbone
import create_batch_array_sinbad_224 as pixels
import sinbad_single_layer
from sinbad import cli, errors, settings, slurm

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder to call the generators in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    ("generator", "flags", "n_tasks", "n_outputs", "words"),
    [
        (backbone, "", 80, 1, "--pyramid_level 7 --crop_size_ratio 0.25"),
        (backbone, "--group class", 5, 16, "--pyramid_level 7 14 --crop_size_ratio 0.25 0.5"),
        (backbone, "--mvtype pushpins --rep 5 0-2 1 --reps_per_task 4", 16, 4, "--rep 0-2 5"),
        (pixels, "", 10, 100, "--rep 0-99"),
        (pixels, "--reps_per_task 30", 40, 30, "--rep 0-29"),
    ],
)
def test_tasks_share_the_work(
    tmp_path: Path, generator: ModuleType, flags: str, n_tasks: int, n_outputs: int, words: str
) -> None:
    generator.main(["--out_dir", str(tmp_path), *flags.split()])
    outputs = slurm.read_outputs(tmp_path / "tasks.tsv")
    assert (len(outputs), len(outputs[0])) == (n_tasks, n_outputs)
    paths = [path for task in outputs for path in task]
    assert len(set(paths)) == len(paths)
    assert f"{words} " in f"{stub.commands(tmp_path)[0]} "
    level, name = ("7", "16_crop") if generator is backbone else ("224", "1022.00_lvl")
    folder = f"{REPO.parent}/sinbad_runs/results/ver1_pyramid_lvl_{level}/rep_num_0/"
    assert re.fullmatch(f"{folder}\\w+_loco/{name}_anom_maps.npz", paths[0])


def test_a_command_computes_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "some weights.pth").touch()
    flags = ["--weights", str(tmp_path / "some weights.pth"), "--net", "resnet18", "--official"]
    flags += ["--seed", "3", "--shrinkage_factor", ".2", "--device", "cpu", "--rep", "0", "2"]
    folder, python = tmp_path / "a b", "apptainer exec --nv 'sin bad.sif' python"
    backbone.main(["--out_dir", str(folder), "--group", "class", "--python", python, *flags])
    levels = ["--pyramid_level", "7", "14", "--crop_size_ratio", ".25", ".5", ".7", ".99"]
    expected = sinbad_single_layer.parse_args(["--mvtype", "all", *levels, *flags])
    for command in stub.commands(folder):
        assert command.startswith(f"{python} {REPO}/sinbad_single_layer.py ")
        args = sinbad_single_layer.parse_args(shlex.split(command)[6:])
        assert cli.settings_of(args) == cli.settings_of(expected)
        assert args.rep == expected.rep
        assert args.data_dir == REPO.parent / "dataset_loco/data_matrices"


def array_options(folder: Path, *flags: str) -> set[str]:
    """Generate an array and return its options for Slurm."""
    backbone.main(["--mvtype", "pushpins_loco", "--out_dir", str(folder), *flags])
    return set(re.findall("^#SBATCH --(.*)", (folder / "array.sbatch").read_text(), re.M))


def test_flags_of_the_cluster(tmp_path: Path) -> None:
    site = tmp_path / "site.txt"
    site.write_text(
        "# our cluster\n--partition gpu\n--time=02:00:00\n--throttle 4\n--sbatch requeue\n"
        "--sbatch mem=16G\n--setup 'module load cuda ; true # quietly'\n--setup 'source activate'\n"
    )
    assert array_options(tmp_path) == {"open-mode=append", "gres=gpu:1"}
    flags = ["--sbatch", "mem=32G", "--account", "a b", "--gres", "gpu:a100:2"]
    options = array_options(tmp_path, f"@{site}", *flags) - {"open-mode=append", "gres=gpu:a100:2"}
    assert options == {"partition=gpu", "time=02:00:00", "requeue", "mem=32G", "account='a b'"}
    setup = "\nmodule load cuda ; true # quietly\nsource activate\n"
    assert setup in (tmp_path / "array.sbatch").read_text()
    assert "--throttle=4" in (tmp_path / "batch_master.sh").read_text()
    for without_gpu in (["--gres", "none"], ["--device", "cpu"]):
        assert array_options(tmp_path, *without_gpu) == {"open-mode=append"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crop_size_ratio", ".5", ".33"], "crop_size_ratio must .* both write 9_crop"),
        (["--mvtype", "a\tb_loco"], r"must be without tabs.*, got '\\t'"),
        (["--results_dir", "a\nb"], r"must be without tabs.*, got '\\n'"),
        (["--version_name", "run#2"], "version_name without #, got '#'"),
        (["--out_dir", "100%"], "out_dir without % and .*, got '%'"),
        (["--throttle", "-1"], "throttle: must be a whole number of at least 0, got -1"),
        (["--account", "a\nb"], r"sbatch must be .* one line, .* got 'account=a\\nb'"),
        (["--sbatch", "job-name=x"], "sbatch must be .* not array, .*, got 'job-name=x'"),
        (["--sbatch=--mem=2G"], "sbatch must be .*, got '--mem=2G'"),
        (["--weights", "missing.pth"], "missing.pth: No such file"),
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


DIGEST = hashlib.sha256(b"weights").hexdigest()  # of the file a.pth
RECORDS = {
    backbone: settings.Settings().recorded(7) | {"weights_sha256": DIGEST},
    pixels: settings.Settings().recorded(224),
}
CHANGES = [
    *((generator, "imagenet", name) for generator, record in RECORDS.items() for name in record),
    *((generator, "imagenet", "crop_size_ratio") for generator in RECORDS),
    (backbone, "imagenet", "compile"),
    *((backbone, weights, "weights_sha256") for weights in ("random", "a.pth")),
]


@pytest.mark.parametrize(("generator", "weights", "name"), CHANGES)
def test_outputs_of_other_settings_do_not_count_as_done(
    work_dir: Path, generator: ModuleType, weights: str, name: str
) -> None:
    (work_dir / "a.pth").write_text("weights")
    flags = ["--out_dir", "a", "--results_dir", "r", "--weights", weights, "--rep", "0-2"]
    flags += ["--mvtype", "pushpins_loco", "--crop_size_ratio", ".5"]
    generator.main(flags)
    path = Path(slurm.read_outputs(Path("a/tasks.tsv"))[-1][-1])
    path.parent.mkdir(parents=True)
    record = RECORDS[generator] | {"crop_size_ratio": 0.5}
    record |= {"weights_sha256": "random"} if weights == "random" else {}
    np.savez(path, run=json.dumps({"settings": record}))
    generator.main(flags)
    other_weights = "0" * 64 if weights == "random" else "random"
    change = {"weights_sha256": other_weights, "compile": True, "net": "other"}.get(name, 0.4)
    np.savez(path, run=json.dumps({"settings": record | {name: change}}))
    message = f"{path} was computed with {name} {change}, now {name} is .*; choose another"
    with pytest.raises(errors.UserError, match=message):
        generator.main(flags)
    generator.main([*flags, "--version_name", "ver2"])
    if name == "compile":
        np.savez(path, run=json.dumps({"settings": record}))  # recorded where it is on
        with pytest.raises(errors.UserError, match="compile False, now compile is True"):
            generator.main([*flags, "--compile"])
    np.savez(path, scores=np.ones(3))  # as the authors' files: no record
    generator.main(flags)
    path.write_bytes(b"PK\3\4 cut")
    with pytest.raises(errors.UserError, match=f"could not read {path}: .*; remove it"):
        generator.main(flags)


# ---------------------------------------------------------------- the scripts themselves


def test_generators_start_at_once_and_without_torch() -> None:
    code = "import time, sys; start = time.time(); import create_batch_array_sinbad_224; "
    code += "print({'torch', 'numpy', 'tqdm'} & {*sys.modules}, time.time() - start < .3)"
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, cwd=REPO, capture_output=True) for _ in range(3)]
    assert b"set() True\n" in [run.stdout for run in runs]  # of three: others use the machine too


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_shellcheck_clean(tmp_path: Path) -> None:
    folder = tmp_path / "with space's"
    array_options(folder, "--setup", "source /x/activate", "--sbatch", "exclude=n[1-3]")
    scripts = [folder / "array.sbatch", folder / "batch_master.sh"]
    run = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert (run.stdout, run.returncode) == ("", 0)


@pytest.mark.parametrize("text", ["", "\udcff\0", "0\ta\tb\n1\ta\tb", "0\ta\tb\n2\ta\tb\n"])
def test_a_damaged_list_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "tasks.tsv").write_bytes(os.fsencode(text))
    with pytest.raises(errors.UserError, match=f"{tmp_path}/tasks.tsv must hold lines of index"):
        pixels.main(["--status", "--out_dir", str(tmp_path)])


# ---------------------------------------------------------------- submission, with stand-ins


def stand_in(folder: Path, name: str, script: str) -> None:
    """Put one of Slurm's commands on the PATH; it notes its arguments in `folder`/<name>_calls."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "$*" >>"{path}_calls"\n{script}\n')
    path.chmod(0o755)


@pytest.fixture
def commands_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder of stand-ins on the PATH: no jobs, arrays of 1001, job 4711 in a banner."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_in(folder, "squeue", 'echo "*** Welcome | to | the cluster ***"')
    stand_in(folder, "scontrol", 'echo "MaxArraySize            = 1001"')
    stand_in(folder, "sbatch", 'echo "*** Quota: 40 % used. ***"; echo "4711;cluster"; echo Bye.')
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def test_only_the_job_id_is_printed(commands_dir: Path, tmp_path: Path) -> None:
    folder = stub.generate(tmp_path, 3, 0, "--throttle", "2")
    assert stub.batch_master(folder).stdout == "4711\n"
    words = (commands_dir / "sbatch_calls").read_text().split()
    assert re.fullmatch("--job-name=sinbad_224_[0-9a-f]{8}", words[1])
    assert words[3:] == ["--array=0-2%2", "array.sbatch"]
    for indices, state, expected in (
        ("0-2%2", "PENDING", {"waiting": "(Resources) 0-2"}),
        ("0-2:2", "COMPLETING", {"running": "0,2", "missing": "1"}),
        ("0,2", "RUNNING", {"running": "0,2", "missing": "1"}),
    ):
        stand_in(commands_dir, "squeue", f'echo Hello; echo "{indices}|{state}|Resources"')
        assert stub.states(folder) == expected
    stub.batch_master(folder)
    assert (commands_dir / "sbatch_calls").read_text().endswith(" --array=1%2 array.sbatch\n")


@pytest.mark.parametrize(
    ("name", "script", "message"),
    [
        ("sbatch", "exit 0", "sbatch printed no job id, got ''; what squeue shows"),
        ("sbatch", "echo no >&2; exit 1", r"could not run sbatch \(is this a login node\?\): no"),
        ("squeue", "echo Unable >&2; echo now >&2; exit 1", "could not run squeue .*: Unable now"),
        ("scontrol", 'echo "MaxArraySize = 2"', "at most 2 tasks .* got 3; --group class and"),
        ("scontrol", 'echo "MaxArraySize = 0"', "at most 0 tasks .* --local needs no array"),
    ],
)
def test_a_submission_that_fails_is_one_line(
    commands_dir: Path, tmp_path: Path, name: str, script: str, message: str
) -> None:
    stand_in(commands_dir, name, script)
    folder = stub.generate(tmp_path, 3, 0)
    run = stub.batch_master(folder)
    assert (run.returncode, run.stdout) == (errors.EXIT_USER_ERROR, "")
    assert re.search(f"^error: .*{message}", run.stderr, re.M), run.stderr
    assert (commands_dir / "sbatch_calls").exists() == (name == "sbatch")
    assert stub.batch_master(folder, "--local", "2").returncode == 0  # needs no Slurm
    stub.check_results(folder)


# ---------------------------------------------------------------- without Slurm


def test_local_runs_resume_and_say_why_a_task_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stub.generate(tmp_path / "it's mine Größe 大", 5, 0.1)
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setenv("STUB_FAILS", "3")
    run = stub.batch_master(folder, "--local", "2")
    assert run.returncode == 1
    reason = "3 failed: error: rep must be another, got it; this line is the reason"
    assert re.search(f"{reason} .*; the same command runs them again", run.stderr)
    status = stub.batch_master(folder, "--status")
    assert status.returncode == 1
    assert status.stdout.startswith(f"4 done 0-2,4\n1 missing 3\n{reason} (logs/sinbad_224_")
    monkeypatch.delenv("STUB_FAILS")
    assert "4 done 0-2,4, 1 missing 3" in stub.batch_master(folder, "--local", "2").stderr
    status = stub.batch_master(folder, "--status")
    assert (status.returncode, status.stdout) == (0, "5 done 0-4\n0 missing\n")
    stub.check_results(folder)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_local_tasks_end_with_an_interrupt(tmp_path: Path, end: signal.Signals) -> None:
    folder = stub.generate(tmp_path, 3, 30)
    command = ["env", "--default-signal=INT", "sh", "batch_master.sh", "--local", "2"]
    run = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    stub.wait_for_tasks(folder, 0, 1)
    run.send_signal(end)
    assert "interrupted; run the same command again" in run.communicate()[1]
    stub.wait_until(lambda: not any(stub.process_of(i, folder) for i in range(3)), "their end")
    status = stub.batch_master(folder, "--status").stdout
    assert status.startswith("0 done\n3 missing 0-2\n0-1 failed: no error message in the log (")


@pytest.mark.parametrize("name", ["it's mine_loco", "$(touch x)_loco", "名前_struct", "a;b_loco"])
def test_a_moved_folder_runs_its_own_tasks_whatever_their_names(tmp_path: Path, name: str) -> None:
    folder = stub.generate(tmp_path, 2, 0, "--mvtype", name).rename(tmp_path / name)
    stub.generate(tmp_path, 2, 0, "--version_name", "other")  # at the old path
    assert stub.batch_master(folder, "--local", "2").returncode == 0
    stub.check_results(folder)
    assert not list(tmp_path.glob("results/other*"))


def test_setup_and_python_are_shell_text_of_the_folder_of_the_call(work_dir: Path) -> None:
    (work_dir / "env.sh").write_text("INTERPRETER=./python\n")
    (work_dir / "python").symlink_to(sys.executable)
    setup = ["--setup", ". ./env.sh", "--python", "env $INTERPRETER"]
    folder = stub.generate(work_dir, 1, 0, *setup)
    assert stub.batch_master(folder, "--local", "1").returncode == 0
    stub.check_results(folder)
