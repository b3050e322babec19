"""Settings: rules, defaults of the levels, what is recorded, flags and back."""

import re
from typing import Any

import numpy as np
import pytest

from sinbad import cli, errors, settings

BAD_VALUES: list[tuple[str, Any, str]] = [
    ("pyramid_level", ["7.5"], "must be a whole number of at least 1, got 7.5"),
    ("crop_size_ratio", ["0.5", "1"], "must be above 0 and below 1, got 1"),
    ("crop_num_edge", 0, "must be a whole number of at least 1, got 0"),
    ("initial_res", "7", "must be a whole number of at least 8, got 7"),
    ("n_projections", "1_0", "must be a whole number of at least 1, got 1_0"),
    ("n_quantiles", "٣", "must be a whole number of at least 1, got ٣"),
    ("shrinkage_factor", 0.0, "must be above 0 to 1, got 0.0"),
    ("lambda_factor", "1_0", "must be from 0 to 1e+06, got 1_0"),
    ("seed", -1, "must be a whole number of at least 0, got -1"),
    ("rep_num_224", 0, "must be a whole number of at least 1, got 0"),
    ("lambda_factor", "nan", "must be from 0 to 1e+06, got nan"),
    ("crop_norm", "image", "must be one of grid, crop, got image"),
    ("crop_pool", "", "must be one of mean, max, got "),
    ("folds", 1, "must be a whole number of at least 2, got 1"),
    ("net", "", "must be text, got ''"),
    ("weights", "", "must be text, got ''"),
    ("precision", "fp64", "must be one of fp32, tf32, bf16, got fp64"),
    ("batch_size", "32.0", "must be a whole number of at least 1, got 32.0"),
    ("num_workers", "many", "must be a whole number of at least 1, got many"),
]


@pytest.mark.parametrize(("name", "value", "rule"), BAD_VALUES)
def test_a_setting_and_its_flag_have_one_rule(name: str, value: object, rule: str) -> None:
    with pytest.raises(errors.UserError, match=re.escape(f"{name} {rule}; see --help")):
        settings.Settings(**{name: value})
    parser = cli.ScriptParser()
    cli.add_settings(parser, [name])
    words = value if isinstance(value, list) else [value]
    flags = [f"--{name}", *map(str, words)] if len(words) > 1 else [f"--{name}={words[0]}"]
    with pytest.raises(errors.UserError, match=re.escape(f"--{name}: {rule}; see --help")):
        parser.parse_args(flags)


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"seed": True}, "seed must be a whole number of at least 0, got True"),
        ({"lambda_factor": True}, "lambda_factor must be from 0 to 1e+06, got True"),
        ({"official": 1}, "official must be True or False, got 1"),
        ({"compile": "no"}, "compile must be True or False, got 'no'"),
        ({"seed": None}, "seed must be a whole number of at least 0, got None"),
        ({"net": 50}, "net must be text, got 50"),
        ({"pyramid_level": 7}, "pyramid_level must be a list, got 7"),
        ({"pyramid_level": "14"}, "pyramid_level must be a list, got '14'"),
        ({"crop_size_ratio": ()}, "crop_size_ratio must hold a value, got none"),
        ({"crop_size_ratio": None}, "crop_size_ratio must be a list, got None"),
    ],
)
def test_values_of_another_type_are_an_error(values: dict[str, Any], rule: str) -> None:
    with pytest.raises(errors.UserError, match=re.escape(f"{rule}; see --help")):
        settings.Settings(**values)


def test_every_setting_has_help_a_rule_and_a_default_that_keeps_it() -> None:
    values = settings.Settings()
    for name, declared in settings.DECLARED.items():
        assert getattr(values, name) == declared.default
        assert declared.metadata["help"]
        assert declared.metadata["rule"]


def test_defaults_are_the_papers() -> None:
    values = settings.Settings()
    assert (values.pyramid_level, values.n_quantiles, values.crop_num_edge) == ((7, 14, 224), 5, 4)
    assert values.crop_size_ratio == (0.25, 0.5, 0.7, 0.99)
    assert (values.lambda_factor, values.rep_num_224, values.initial_res) == (0.1, 100, 1024)
    assert (values.crop_norm, values.crop_pool, values.official) == ("grid", "mean", False)
    assert (values.net, values.weights, values.precision) == ("wide_resnet50_2", "imagenet", "fp32")


def test_values_of_a_list_count_once_in_their_order() -> None:
    ratios, levels = (0.99, 0.5, "0.99", 0.25, 0.5), np.array([224, 7, 224])
    values = settings.Settings(crop_size_ratio=ratios, pyramid_level=levels)
    assert values.crop_size_ratio == (0.99, 0.5, 0.25)
    assert values.pyramid_level == (224, 7)
    assert settings.backbone_levels((14, 224, 7, 14)) == (14, 7)


@pytest.mark.parametrize(
    ("level", "defaults"), [(7, (1000, 0.1)), (28, (1000, 0.1)), (224, (10, 1.0))]
)
def test_a_level_fills_its_defaults_in(level: int, defaults: tuple[int, float]) -> None:
    values = settings.Settings()
    assert (values.n_projections, values.shrinkage_factor) == (None, None)
    assert (values.batch_size, values.num_workers) == (None, None)
    filled = values.at_level(level)
    assert (filled.n_projections, filled.shrinkage_factor) == defaults
    chosen = settings.Settings(n_projections=3, shrinkage_factor=0.5)
    assert chosen.at_level(level) == chosen


def test_workers_are_the_processors_unless_set() -> None:
    assert settings.Settings(num_workers=3).n_workers == 3
    assert settings.Settings().n_workers >= 1


def test_the_record_holds_what_determines_scores() -> None:
    backbone = {"net": "resnet18", "precision": "bf16"}
    values = settings.Settings(**backbone, official=True, seed=4, n_quantiles=6, batch_size=3)
    expected = {"crop_num_edge": 4, "initial_res": 1024, "n_quantiles": 6, "seed": 4}
    expected |= {"official": True}
    at_backbone = {"n_projections": 1000, "shrinkage_factor": 0.1}
    assert values.recorded(14) == expected | at_backbone | backbone
    at_pixels = {"n_projections": 10, "shrinkage_factor": 1.0}
    assert values.recorded(224) == expected | at_pixels
    compiled = settings.Settings(compile=True)
    assert compiled.recorded(14) == settings.Settings().recorded(14) | {"compile": True}
    assert compiled.recorded(224) == settings.Settings().recorded(224)


def test_every_recorded_setting_is_compared_in_one_scope() -> None:
    scopes = settings.ALL_FILES, settings.BACKBONE_FILES, settings.LEVEL_FILES, settings.RUN_FILES
    compared = [name for scope in scopes for name in settings.names_equal_in(scope)]
    assert sorted(compared) == sorted(settings.Settings(compile=True).recorded(14))


@pytest.mark.parametrize(
    ("recorded", "expected", "difference"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, None),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, ("b", 2, 3)),
        ({"a": 1}, {"a": 1, "c": 4}, ("c", None, 4)),
        ({"a": 1, "c": 4}, {"a": 1}, ("c", 4, None)),
    ],
)
def test_the_first_difference_is_named(
    recorded: dict[str, int], expected: dict[str, int], difference: tuple[Any, ...] | None
) -> None:
    assert settings.first_difference(recorded, expected) == difference


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pyramid_level": (224, 7), "crop_size_ratio": (0.125,), "official": True, "seed": 3},
        {"n_projections": 5, "shrinkage_factor": 0.25, "crop_norm": "crop", "lambda_factor": 1e-7},
        {"weights": "/a folder/net.pth", "compile": True, "device": "cuda:1", "num_workers": 2},
    ],
)
def test_settings_to_flags_and_back(changes: dict[str, Any]) -> None:
    values = settings.Settings(**changes)
    parser = cli.ScriptParser()
    cli.add_settings(parser, settings.DECLARED)
    flags = cli.flags_of(values, settings.DECLARED)
    assert cli.settings_of(parser.parse_args(flags)) == values
    tuples = ("--pyramid_level", "--crop_size_ratio")
    named = {flag.partition("=")[0] for flag in flags if flag.startswith("--")}
    assert named == {*tuples, *(f"--{name}" for name in changes)}
