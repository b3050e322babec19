"""Facts of MVTec LOCO AD and the paper's settings; names of test subsets and score files.

Source: Bergmann et al., "Beyond Dents and Scratches", IJCV 2022; arXiv 2302.12245 and 2311.14773.
Standard library only: the array generators import this on login nodes.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sinbad import errors

log = logging.getLogger(__name__)

KINDS = {"loco": "logical_anomalies", "struct": "structural_anomalies"}
ALL = "all"  # suffix of a data set of all anomalies of a category, whatever their folders
KIND_NAMES = {"loco": "logical", "struct": "structural"}
DOWNLOAD_PAGE = "https://www.mvtec.com/company/research/datasets/mvtec-loco"
ARCHIVE_SHA256 = "9e7c84dba550fd2e59d8e9e231c929c45ba737b6b6a6d3814100f54d63aae687"


@dataclass(frozen=True)
class LocoClass:
    """One category of LOCO: size of its images in pixels, numbers of images of its five parts."""

    width: int
    height: int
    train: int
    validation: int
    good: int
    structural: int
    logical: int


LOCO_CLASSES = {
    "breakfast_box": LocoClass(1600, 1280, 351, 62, 102, 90, 83),
    "juice_bottle": LocoClass(800, 1600, 335, 54, 94, 94, 142),
    "pushpins": LocoClass(1700, 1000, 372, 69, 138, 81, 91),
    "screw_bag": LocoClass(1600, 1100, 360, 60, 122, 82, 137),
    "splicing_connectors": LocoClass(1700, 850, 354, 59, 119, 85, 108),
}
# Some copies of the archive hold these numbers of train and validation images instead.
OTHER_COUNTS = {"splicing_connectors": {"train": 360, "validation": 60}}

# Image-level AUROC in percent. SINBAD: arXiv 2302.12245, as quoted by the README of PSAD.
PUBLISHED_LOCO = {
    "loco": {
        "breakfast_box": 96.5,
        "juice_bottle": 96.6,
        "pushpins": 83.4,
        "screw_bag": 78.6,
        "splicing_connectors": 89.3,
        "mean": 88.9,
    },
    "struct": {
        "breakfast_box": 87.5,
        "juice_bottle": 93.1,
        "pushpins": 74.2,
        "screw_bag": 92.2,
        "splicing_connectors": 76.7,
        "mean": 84.7,
    },
}
# SINBAD Ens, mean of logical and structural: arXiv 2311.14773, as quoted by benchmark sites.
PUBLISHED_ENSEMBLE_MEAN = 88.3


# ---------------------------------------------------------------- names of data sets


def split_mvtype(mvtype: str) -> tuple[str, str]:
    """Split a test subset's name: "pushpins_loco" -> category "pushpins", anomaly type "loco"."""
    category, _, anomaly_type = mvtype.rpartition("_")
    if not category or anomaly_type not in (*KINDS, ALL) or "/" in mvtype:
        raise errors.UserError(
            "mvtype must be a test subset (<category>_loco, <category>_struct, <category>_all), a "
            f"category, loco, struct or all, got {mvtype}; LOCO's categories are "
            f"{', '.join(LOCO_CLASSES)}"
        )
    return category, anomaly_type


def expand_mvtypes(names: Iterable[str], types_of: Mapping[str, Sequence[str]]) -> list[str]:
    """Expand the values of `--mvtype` to names of test subsets, by category, logical first.

    Parameters
    ----------
    names : test subsets (`pushpins_loco`), categories (`pushpins`), or `loco`, `struct`, `all`
    types_of : category -> the anomaly types of its test subsets

    Raises
    ------
    UserError
        If a name is neither a test subset, nor a known category, nor one of the three groups.
    """
    everything = [(category, t) for category, types in types_of.items() for t in types]
    subsets: dict[str, None] = {}
    for name in names:
        if name == ALL or name in KINDS:
            expanded = [f"{category}_{t}" for category, t in everything if name in (ALL, t)]
        elif name in types_of or name in LOCO_CLASSES:
            expanded = [f"{name}_{t}" for t in types_of.get(name, KINDS)]
        else:
            split_mvtype(name)  # an error, if it is no name of a test subset
            expanded = [name]
        subsets |= dict.fromkeys(expanded)
    return list(subsets)


def choose_mvtypes(names: Iterable[str], present: Iterable[str]) -> list[str]:
    """Return the test subsets of some names; of a category or a group those that are present.

    If none is present, all test subsets of the names: the caller reports what is missing.

    Parameters
    ----------
    names : values of `--mvtype`
    present : existing test subsets; their categories are part of `loco`, `struct` and `all`
    """
    names, suffixes = list(names), tuple(f"_{anomaly_type}" for anomaly_type in (*KINDS, ALL))
    existing = {name for name in present if name.endswith(suffixes)}
    types_of: dict[str, Sequence[str]] = dict.fromkeys(LOCO_CLASSES, tuple(KINDS))
    for category, anomaly_type in sorted(map(split_mvtype, existing)):  # "all" comes first
        types_of[category] = (ALL,) if anomaly_type == ALL else tuple(KINDS)
    expanded = expand_mvtypes(names, types_of)
    chosen = [name for name in expanded if name in existing or name in names]
    missing = [name for name in expanded if name not in chosen]
    if chosen and missing:
        log.info(f"note: not found: {', '.join(missing)}")
    return chosen or expanded
