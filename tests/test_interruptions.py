"""Runs killed at any moment, runs side by side, a GPU that runs out of memory: the same bytes.

    SINBAD_KILLS=20 python -m pytest tests/test_interruptions.py -k killed_at

kills every script 20 times, 140 times in all.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uea_toy
from conftest import IM_SIZE, files_below

ROOT = Path(__file__).parents[1]
KILLED = -9
N_KILLS = int(os.environ.get("SINBAD_KILLS", "2"))  # of each script
SMALL = f"--initial_res {IM_SIZE} --device cpu --pyramid_level 224"
ARGUMENTS = {
    "data_to_matrices": "--dataset_dir {images} --out_dir {out} --im_size 512 --num_workers 2",
    "sinbad_single_layer": "--data_dir {matrices} --results_dir {out} --mvtype pushpins "
    f"{SMALL} --n_projections 2 --crop_size_ratio .999 .7 --rep 0-3",
    "calc_anom_ensm": "--version {inputs}/ver1_pyramid_lvl_# --mvtype pushpins --pyramid_level 14 "
    "--version_224 {inputs}/ver1_pyramid_lvl_# --rep_num_224 0 --maps_dir {out}/maps --out {out}/t",
    "reproduce_paper": "--dataset_dir {images} --data_dir {out}/data --results_dir {out}/scores "
    f"--out {{out}}/tables {SMALL} --no-figures --rep_num_224 6 --seeds 0 1",
    "sinbad_time_series": "--dataset_dir {inputs}/uea --dataset Toy --n_projections 20 "
    "--device cpu --seeds 0-3 --out {out}",
    "sinbad_detector": "fit --train_dir {images}/pushpins/train/good --out {out}/detector.npz "
    f"{SMALL} --rep_num_224 6",
    "create_batch_array_sinbad": "--data_dir {matrices} --mvtype pushpins --out_dir {out}",
}
Run = Callable[..., tuple[list[int], float]]


@pytest.fixture(scope="module")
def run(
    dataset_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    """Return a function that runs a script once for each output folder (see fork_server.py)."""
    inputs = tmp_path_factory.mktemp("inputs")  # scores of level 14, time series
    paths = {"images": dataset_dir, "matrices": data_dir, "inputs": inputs}

    def run(script: str, *outs: Path, more: str = "", **kill: Any) -> tuple[list[int], float]:  # noqa: ANN401
        arguments = ARGUMENTS[script] + more
        runs = [(script, arguments.format(out=out, **paths).split()) for out in outs]
        process.stdin.write(json.dumps({"runs": runs, **kill}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    with subprocess.Popen(
        [sys.executable, ROOT / "tests/fork_server.py", *ARGUMENTS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    ) as process:
        level = " --net resnet18 --weights random --pyramid_level 14 --crop_size_ratio .7 --rep 0"
        assert run("sinbad_single_layer", inputs, more=level)[0] == [0]
        uea_toy.write_toy(inputs / "uea")
        yield run
        process.stdin.close()  # it ends with its input


@pytest.mark.parametrize("script", ARGUMENTS)
def test_a_run_killed_at_any_moment_and_started_again_gives_the_same_bytes(
    script: str, run: Run, tmp_path: Path
) -> None:
    """Started again twice at once; and once where another run has finished everything meanwhile."""
    undisturbed, killed, finished = (tmp_path / name for name in ("none", "killed", "finished"))
    codes, longest = run(script, undisturbed)
    assert codes == [0]
    expected = contents(undisturbed)
    moments, n_killed = random.Random(0), 0
    while n_killed < N_KILLS:
        after, at_rename = moments.uniform(0.02, 1.0) * longest, moments.randint(1, 1 + n_killed)
        by_time = n_killed % 2 == 1
        kill = {"kill_after": after} if by_time else {"kill_at_rename": at_rename}
        killed.mkdir()
        if run(script, killed, **kill)[0] == [KILLED]:
            n_killed += 1
            for name, data in contents(killed).items():
                if ".partial" not in name:  # what is under its name is complete
                    assert data == expected[name]
            assert by_time or list(killed.rglob(".*.partial"))
        elif by_time:  # it was faster than the moment: kill earlier
            longest = after
        shutil.copytree(killed, finished)
        shutil.copytree(undisturbed, finished, dirs_exist_ok=True)
        assert run(script, killed, killed, finished)[0] == [0, 0, 0]
        assert contents(killed) == contents(finished) == expected
        shutil.rmtree(killed)
        shutil.rmtree(finished)


def contents(folder: Path) -> dict[str, bytes]:
    """Return name -> bytes, without the folder's path in texts (a report names its scores')."""
    files = files_below(folder)
    return {name: data.replace(str(folder).encode(), b"FOLDER") for name, data in files.items()}
