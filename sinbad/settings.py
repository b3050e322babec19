"""Every setting of the method, declared once: default, rule, help, and where it must be equal.

Flags, the record in the files of scores, the comparison of records, the detector's settings and the
command lines of array tasks are all made from `Settings`. Standard library only.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sinbad import crops, errors

PIXEL_LEVEL = 224  # the raw pixels; any other level is the side of a feature map
PAPER_LEVELS = (7, 14)  # of the backbone
IM_SIZE = 1024  # pixels, side of the preprocessed images
VALID_SHARE = 0.1  # fraction of the training images used for validation where there is none


@dataclass(frozen=True)
class LevelDefaults:
    """The paper's settings of a level: crops, random projections, shrinkage, repetitions."""

    crop_ratios: tuple[float, ...]
    n_projections: int
    shrinkage_factor: float
    n_reps: int


BACKBONE_DEFAULTS = LevelDefaults((0.25, 0.5, 0.7, 0.99), 1000, 0.1, 1)
PIXEL_DEFAULTS = LevelDefaults((0.999,), 10, 1.0, 100)


def level_defaults(level: int) -> LevelDefaults:
    """Return the paper's settings of a pyramid level."""
    return PIXEL_DEFAULTS if level == PIXEL_LEVEL else BACKBONE_DEFAULTS


def backbone_levels(levels: Iterable[int]) -> tuple[int, ...]:
    """Return the levels that need the backbone, each once."""
    return tuple(level for level in dict.fromkeys(levels) if level != PIXEL_LEVEL)


# ---------------------------------------------------------------- rules

# A plain decimal number; float() would read 1_0, infinity and the digits of other scripts too.
DECIMAL = r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
Rule = Callable[[Any], Any]  # text or a value -> the value; ValueError says what it must be


def whole_number(low: int) -> Rule:
    """Return the rule of a whole number not below `low`."""

    def check(value: object) -> int:
        text = str(value)
        if not re.fullmatch(r"[+]?[0-9]{1,18}", text) or int(text) < low:
            raise ValueError(f"must be a whole number of at least {low}, got {value}")
        return int(text)

    return check


def number(low: float, high: float, ends: str = "[]") -> Rule:
    """Return the rule of a number of an interval; `ends`, as "(]", says which ends are included."""
    lower = f"{'above' if ends[0] == '(' else 'from'} {low:g}"
    text = f"{lower} {'and below' if ends[1] == ')' else 'to'} {high:g}"

    def check(value: Any) -> float:  # noqa: ANN401  what a person gives
        result = float(value) if re.fullmatch(DECIMAL, str(value)) else float("nan")
        open_end = (result == low and ends[0] == "(") or (result == high and ends[1] == ")")
        if not low <= result <= high or open_end:
            raise ValueError(f"must be {text}, got {value}")
        return result

    return check


def choice(*names: str) -> Rule:
    """Return the rule of one of some words."""

    def check(value: object) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}, got {value}")
        return str(value)

    return check


def text(value: object) -> str:
    """Take any text, and paths."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ValueError(f"must be text, got {value!r}")
    return os.fspath(value)


def name_or_path(value: object) -> str:
    """Take a text; ~ is the home folder."""
    return os.path.expanduser(text(value))


def switch(value: object) -> bool:
    """Take True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"must be True or False, got {value!r}")
    return value


# ---------------------------------------------------------------- the settings

# Titles of the groups of flags.
INPUT_OUTPUT, COMPUTED, BACKBONE, MACHINE = (
    "input and output",
    "what is computed",
    "network",
    "machine",
)
# Among which files of scores a recorded setting must be equal to be ensembled.
ALL_FILES, BACKBONE_FILES, LEVEL_FILES, RUN_FILES = (
    "all files",
    "files of the backbone's levels",
    "files of one level",
    "files of one run",
)


def setting(
    default: Any,  # noqa: ANN401  of any type
    rule: Rule,
    help: str,  # noqa: A002  argparse's word
    group: str = COMPUTED,
    equal_in: str | None = None,
) -> Any:  # noqa: ANN401  dataclasses.field is typed so too
    """Declare a setting; one without `equal_in` does not determine scores and is not recorded."""
    metadata = {"rule": rule, "help": help, "group": group, "equal_in": equal_in}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """What is computed, and how; names are those of the flags.

    None stands for the level's, the device's or the machine's default. A tuple's rule holds for
    each of its values.

    Raises
    ------
    UserError
        If a value breaks its rule.
    """

    pyramid_level: tuple[int, ...] = setting(
        (*PAPER_LEVELS, PIXEL_LEVEL),
        whole_number(1),
        "feature levels, by the side of their feature map (7, 14, 28, 56), and 224 for raw pixels",
    )
    crop_size_ratio: tuple[float, ...] = setting(
        BACKBONE_DEFAULTS.crop_ratios,
        number(0, 1, "()"),
        "side of a crop over that of the image, of each crop grid",
    )
    crop_num_edge: int = setting(
        4, whole_number(1), "stride of the crops is the image's side over this", equal_in=ALL_FILES
    )
    initial_res: int = setting(
        IM_SIZE, whole_number(8), "side of the preprocessed images in pixels", equal_in=ALL_FILES
    )
    n_projections: int | None = setting(
        None,
        whole_number(1),
        "random projections (default: 1000, level 224: 10)",
        equal_in=LEVEL_FILES,
    )
    n_quantiles: int = setting(
        5, whole_number(1), "histogram bins per projection, evenly spaced", equal_in=LEVEL_FILES
    )
    shrinkage_factor: float | None = setting(
        None,
        number(0, 1, "(]"),
        "covariance shrinkage, above 0 to 1 (default: 0.1, level 224: 1)",
        equal_in=LEVEL_FILES,
    )
    seed: int = setting(0, whole_number(0), "seed of the random projections", equal_in=RUN_FILES)
    rep_num_224: int = setting(
        PIXEL_DEFAULTS.n_reps, whole_number(1), "repetitions of the raw-pixel level"
    )
    official: bool = setting(
        False,
        switch,
        "upstream's numerics: ranges of each split's own images, C^-1 for C^(-1/2)",
        equal_in=ALL_FILES,
    )
    lambda_factor: float = setting(0.1, number(0, 1e6), "weight of the raw-pixel level")
    crop_norm: str = setting(
        "grid", choice("grid", "crop"), "grid or crop: whose validation mean divides crop scores"
    )
    crop_pool: str = setting(
        "mean", choice("mean", "max"), "mean or max: how an image's crop scores are pooled"
    )
    folds: int = setting(
        10, whole_number(2), "cross-validation folds of the calibration without --valid_dir"
    )
    net: str = setting(
        "wide_resnet50_2",
        text,
        "torchvision ResNet or ResNeXt, or timm model with feature maps",
        BACKBONE,
        BACKBONE_FILES,
    )
    weights: str = setting(
        "imagenet",
        name_or_path,
        "imagenet (downloaded once), random, or a file with a state_dict",
        BACKBONE,
    )
    precision: str = setting(
        "fp32",
        choice("fp32", "tf32", "bf16"),
        "fp32, tf32 or bf16: precision of the network; tf32 acts on CUDA only",
        BACKBONE,
        BACKBONE_FILES,
    )
    compile: bool = setting(
        False,
        switch,
        "speed the network up by torch.compile; scores may change by rounding",
        BACKBONE,
        BACKBONE_FILES,
    )
    batch_size: int | None = setting(
        None, whole_number(1), "crops per forward pass (default: 8, on a GPU 256)", BACKBONE
    )
    device: str = setting("auto", text, "auto, cpu, cuda or cuda:<i>", MACHINE)
    num_workers: int | None = setting(
        None, whole_number(1), "threads that read images (default: one per processor)", MACHINE
    )

    def __post_init__(self) -> None:
        for declared in fields(self):
            value = getattr(self, declared.name)
            if value is None and declared.default is None:
                continue
            rule = declared.metadata["rule"]
            try:
                if isinstance(declared.default, tuple):
                    if isinstance(value, str) or not isinstance(value, Iterable):
                        raise ValueError(f"must be a list, got {value!r}")
                    checked = tuple(dict.fromkeys(map(rule, value)))
                    if not checked:
                        raise ValueError("must hold a value, got none")
                else:
                    checked = rule(value)
            except ValueError as error:
                raise errors.UserError(f"{declared.name} {error}; see --help") from None
            object.__setattr__(self, declared.name, checked)

    @property
    def n_workers(self) -> int:
        """Threads that read images: `num_workers`, else one per processor of this process."""
        affinity = getattr(os, "sched_getaffinity", None)  # not on every system
        return self.num_workers or (len(affinity(0)) if affinity else os.cpu_count() or 1)

    def grid(self, ratio: float) -> crops.CropGrid:
        """Return the crop grid of a ratio."""
        return crops.CropGrid(self.initial_res, ratio, self.crop_num_edge)

    def at_level(self, level: int) -> "Settings":
        """Return the settings with the defaults of a level filled in."""
        defaults = level_defaults(level)
        return replace(
            self,
            n_projections=self.n_projections or defaults.n_projections,
            shrinkage_factor=self.shrinkage_factor or defaults.shrinkage_factor,
        )

    def recorded(self, level: int) -> dict[str, Any]:
        """Return what determines scores of a level, as their files record it."""
        values = self.at_level(level)
        names = [
            declared.name
            for declared in fields(self)
            if declared.metadata["equal_in"] is not None
            and (level != PIXEL_LEVEL or declared.metadata["equal_in"] != BACKBONE_FILES)
        ]
        record = {name: getattr(values, name) for name in names}
        if not record.get("compile", True):  # files of earlier versions are without it
            del record["compile"]
        return record


DECLARED = {declared.name: declared for declared in fields(Settings)}


def names_equal_in(scope: str) -> tuple[str, ...]:
    """Return the recorded settings that must be equal in a scope such as ALL_FILES."""
    return tuple(n for n, declared in DECLARED.items() if declared.metadata["equal_in"] == scope)


def first_difference(
    recorded: dict[str, Any], expected: dict[str, Any]
) -> tuple[str, Any, Any] | None:
    """Return (name, recorded, expected) of the first setting that differs, else None."""
    for name in expected | recorded:
        if recorded.get(name) != expected.get(name):
            return name, recorded.get(name), expected.get(name)
    return None
