"""The plan of a run: settings, what is refused, the commit that is recorded."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sinbad_single_layer
from sinbad import errors, matrices, score_plans, scoring
from sinbad import score_plans as plans


def plan_of(ratio: float, *flags: str) -> score_plans.ScorePlan:
    """Return the plan of two grids at level 14."""
    args = sinbad_single_layer.parse_args(["--mvtype", "pushpins", "--initial_res", "64", *flags])
    tasks = [score_plans.ScoreTask("pushpins_loco", 14, r, 0, 0, "ver1") for r in (0.99, ratio)]
    return score_plans.ScorePlan.of(args, tasks, Path())


def test_settings_are_the_levels_own_or_those_of_the_flags() -> None:
    score_plan = plan_of(0.7)
    assert (
        score_plan.descriptor(7)
        == score_plan.descriptor(14)
        == score_plans.Descriptor(1000, 5, 0.1)
    )
    assert score_plan.descriptor(224) == score_plans.Descriptor(10, 5, 1.0)
    given = plan_of(0.7, "--n_projections", "3", "--n_quantiles", "4", "--shrinkage_factor", ".2")
    assert given.descriptor(7) == given.descriptor(224) == score_plans.Descriptor(3, 4, 0.2)
    sizes = [score_plan.batch_size_on(torch.device(name)) for name in ("cpu", "cuda")]
    assert sizes == [32, 256]
    assert plan_of(0.7, "--batch_size", "6").batch_size_on(torch.device("cpu")) == 6


def test_two_grids_of_one_file_are_refused() -> None:
    with pytest.raises(
        errors.UserError, match=r"got 0\.99 and 0\.9, which both write 1_crop_anom_maps"
    ):
        plan_of(0.9)


def test_two_training_images_are_enough_and_one_is_not(data_dir: Path) -> None:
    data_set = matrices.load_matrices(data_dir, "pushpins_loco")
    plan, cpu = plan_of(0.7), torch.device("cpu")
    for n_train in (2, 1):
        images = {**data_set.images, "train": data_set.images["train"][:n_train]}
        paths = {**data_set.paths, "train": data_set.paths["train"][:n_train]}
        sets = {"pushpins_loco": replace(data_set, images=images, paths=paths, files={})}
        if n_train == 2:
            scoring.ClassScorer(plan, sets, None, cpu)
        else:
            with pytest.raises(
                errors.UserError, match="must be at least 2, got 1 of pushpins_loco"
            ):
                scoring.ClassScorer(plan, sets, None, cpu)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_recorded_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(plans, "__file__", str(tmp_path / "plan.py"))
    made_with = plans.made_with.__wrapped__  # without its cache
    assert made_with(5, torch.device("cpu"))["commit"] == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "plan.py").touch()
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True, text=True)
    assert made_with(5, torch.device("cpu"))["commit"] == head.stdout.strip()
    (tmp_path / "plan.py").write_text("changed since\n")
    assert made_with(5, torch.device("cpu"))["commit"] == f"{head.stdout.strip()}-dirty"
