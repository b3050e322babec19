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


# ---------------------------------------------------------------- names of test subsets


def split_mvtype(mvtype: str) -> tuple[str, str]:
    """Split a test subset's name: "pushpins_loco" -> category "pushpins", anomaly type "loco"."""
    category, _, anomaly_type = mvtype.rpartition("_")
    if not category or anomaly_type not in (*KINDS, ALL) or "/" in mvtype:
        raise errors.UserError(
            "mvtype must be a test subset (<class>_loco, <class>_struct, <class>_all), a category, "
            f"loco, struct or all, got {mvtype}; LOCO's categories are {', '.join(LOCO_CLASSES)}"
        )
    return category, anomaly_type


def expand_mvtypes(names: Iterable[str], types: Mapping[str, Sequence[str]]) -> list[str]:
    """Expand the values of `--mvtype` to names of test subsets, by category, logical first.

    Parameters
    ----------
    names : test subsets (`pushpins_loco`), categories (`pushpins`), or `loco`, `struct`, `all`
    types : category -> the anomaly types of its test subsets

    Raises
    ------
    UserError
        If a name is neither a test subset, nor a known category, nor one of the three groups.
    """
    mvtypes: list[str] = []
    for name in names:
        if name == ALL or name in KINDS:
            pairs = ((category, kind) for category in types for kind in types[category])
            mvtypes += [f"{category}_{kind}" for category, kind in pairs if name in (ALL, kind)]
        elif name in types or name in LOCO_CLASSES:
            mvtypes += [f"{name}_{kind}" for kind in types.get(name, KINDS)]
        else:
            split_mvtype(name)
            mvtypes.append(name)
    return list(dict.fromkeys(mvtypes))


def choose_mvtypes(names: Iterable[str], present: Iterable[str]) -> list[str]:
    """Return the test subsets of some names; of a category or a group those that are present.

    If none is present, all test subsets of the names: the caller reports what is missing.

    Parameters
    ----------
    names : values of `--mvtype`
    present : existing test subsets; their categories belong to `loco`, `struct` and `all`
    """
    names = list(names)
    subsets = {n for n in present if n.endswith(tuple(f"_{kind}" for kind in (*KINDS, ALL)))}
    types: dict[str, Sequence[str]] = dict.fromkeys(LOCO_CLASSES, tuple(KINDS))
    for category, anomaly_type in sorted(map(split_mvtype, subsets)):  # all comes first
        types[category] = (ALL,) if anomaly_type == ALL else tuple(KINDS)
    mvtypes = expand_mvtypes(names, types)
    chosen = [name for name in mvtypes if name in subsets or name in names]
    missing = [name for name in mvtypes if name not in chosen]
    if missing and any(split_mvtype(name)[0] in LOCO_CLASSES for name in chosen):
        log.info(f"note: not found: {', '.join(missing)}")
    return chosen or mvtypes
