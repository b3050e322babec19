"""A detector for one's own pictures: fit once, save, load, score one picture or a thousand.

The scores are the ensemble's of the step-by-step scripts, by the same code. What is kept of the
training pictures are their descriptors, as whole numbers: a share is a count of elements over their
number. The verdict is conformal: of good pictures like the calibration ones at most the share
`false_alarms` is called anomalous.
"""

import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import sinbad_utils
from sinbad import (
    atomic,
    backbones,
    ensembles,
    errors,
    images,
    loco,
    matrices,
    score_files,
    score_plans,
    scoring,
)

log = logging.getLogger(__name__)

FORMAT = 1  # of the file
Grid = tuple[int, int]  # level, number of crops
Position = tuple[int, int, int]  # level, number of crops, crop


@dataclass(frozen=True)
class DetectorOptions:
    """What is computed; the names and the defaults are those of the flags.

    None stands for the level's, the device's or the machine's own value.
    """

    net: str = "wide_resnet50_2"
    weights: str = "imagenet"
    precision: str = "fp32"
    compile: bool = False
    batch_size: int | None = None
    pyramid_level: tuple[int, ...] = (*loco.PAPER_LEVELS, loco.PIXEL_LEVEL)
    crop_size_ratio: tuple[float, ...] = loco.NETWORK_SETTINGS.crop_ratios
    rep_num_224: int = loco.PIXEL_SETTINGS.n_reps
    seed: int = 0
    n_projections: int | None = None
    n_quantiles: int = loco.N_QUANTILES
    shrinkage_factor: float | None = None
    crop_num_edge: int = loco.CROP_NUM_EDGE
    initial_res: int = loco.IM_SIZE
    lambda_factor: float = loco.LAMBDA_FACTOR
    folds: int = 10
    num_workers: int | None = None

    def plan(self) -> score_plans.ScorePlan:
        """Return the scores to compute: every level and grid, and the raw pixels' repetitions."""
        levels = loco.network_levels(self.pyramid_level)
        wanted = [(level, ratio, 0) for level in levels for ratio in self.crop_size_ratio]
        if loco.PIXEL_LEVEL in self.pyramid_level:
            (ratio,) = loco.PIXEL_SETTINGS.crop_ratios
            wanted += [(loco.PIXEL_LEVEL, ratio, rep) for rep in range(self.rep_num_224)]
        tasks = tuple(
            score_plans.ScoreTask(images.NAME, *own[:2], self.seed, own[2], "") for own in wanted
        )
        own = asdict(self) | {"num_workers": self.num_workers or os.cpu_count() or 1}
        used = {
            name: own[name] for name in score_plans.ScorePlan.__dataclass_fields__ if name in own
        }
        here = Path()  # nothing is read or written by these
        return score_plans.ScorePlan(
            tasks, data_dir=here, results_dir=here, overwrite=False, official=False, **used
        )

    def grid(self, task: score_plans.ScoreTask) -> Grid:
        """Return a task's level and number of crops."""
        corners = loco.crop_corners(self.initial_res, task.ratio, self.crop_num_edge)
        return task.level, len(corners)


@dataclass(frozen=True)
class Verdict:
    """What a detector says of one picture.

    Attributes
    ----------
    path : of the picture, or its number where it has none
    score : SINBAD's ensemble, higher = more anomalous; NaN for a broken picture
    p_value : share of good pictures expected to score so high
    is_anomalous : whether the p-value is at most the rate of false alarms
    levels : level -> normalised score
    error : why a picture has no score, else ""
    """

    path: str
    score: float = math.nan
    p_value: float = math.nan
    is_anomalous: bool = False
    levels: dict[int, float] = field(default_factory=dict)
    error: str = ""


@dataclass
class Fitted:
    """What is kept of one crop position, of each draw of directions.

    Attributes
    ----------
    ranges : (2, n_draws, n_directions), float32, low and high
    counts : (n_draws, n_train, n_directions * n_bins), elements below each threshold
    n_elements : of a set
    whitenings : of each draw, fitted when they are needed
    """

    ranges: Tensor
    counts: NDArray[Any]
    n_elements: int
    whitenings: list[sinbad_utils.WhitenedNeighbours] = field(default_factory=list)

    def descriptors(self, draw: int) -> Tensor:
        """Return the training descriptors of a draw, (n_train, n_directions * n_bins), float32."""
        low, high = self.ranges[:, draw]
        counts = torch.from_numpy(self.counts[draw].astype(np.float32))
        shares = counts.reshape(len(counts), len(low), -1)
        return (shares * ((high > low) / self.n_elements)[:, None]).flatten(1)


# ---------------------------------------------------------------- the detector


class Detector:
    """A fitted detector; made by `fit` or `load`.

    Attributes
    ----------
    options : DetectorOptions
    about : what it was made of: the weights' sha256, matrices' settings, numbers of pictures
    positions : (level, number of crops, crop) -> Fitted; what is padding only is not there
    crops : (level, number of crops) -> (n_draws, n_crops, n), crop scores of calibration pictures
    calibration : (n,), their ensemble scores
    """

    def __init__(
        self,
        options: DetectorOptions,
        about: dict[str, Any],
        positions: dict[Position, Fitted],
        crops: dict[Grid, sinbad_utils.Scores],
        extractor: backbones.FeatureExtractor | None,
        device: torch.device,
    ) -> None:
        self.options, self.about, self.positions, self.crops = options, about, positions, crops
        self.extractor, self.device = extractor, device
        self.calibration = self._join(crops).final

    @classmethod
    def fit(
        cls,
        train: Sequence[images.ImageInput],
        valid: Sequence[images.ImageInput] = (),
        options: DetectorOptions | None = None,
        device: str = "auto",
    ) -> "Detector":
        """Fit a detector on good pictures.

        Parameters
        ----------
        train : paths, Pillow images or (height, width, 3) uint8 arrays, all of one aspect
        valid : other good pictures, for normalisation and verdict; if none are given the training
            pictures are scored in folds, each by the others
        options : what is computed
        device : auto, cpu, cuda or cuda:<i>

        Raises
        ------
        UserError
            If a picture cannot be read, or there are too few.
        """
        options, where = options or DetectorOptions(), backbones.choose_device(device)
        if len(train) < 4:
            raise errors.UserError(
                f"training pictures must be at least 4, got {len(train)}; add some"
            )
        settings = images.resize_settings(images.open_image(train[0]).size, options.initial_res)
        splits = {
            "train": images.matrices_in_file(train, settings),
            "valid": images.matrices_in_file(valid, settings),
        }
        digests = [{hashlib.sha256(m).hexdigest() for m in own} for own in splits.values()]
        n_same = len(digests[0] & digests[1])
        if n_same:
            log.warning(
                f"{n_same} validation pictures are training pictures too: they score "
                "about 0, so others score too high"
            )
        extractor, sha256 = _load_network(options, where)
        about = {
            "matrices": settings,
            "weights_sha256": sha256,
            "n_train": len(train),
            "n_valid": len(valid),
        }
        scorer = scoring.ClassScorer(
            options.plan(), {images.NAME: images.matrix_set(settings, **splits)}, extractor, where
        )
        positions, crops = _fit_positions(scorer, options)
        return cls(options, about, positions, crops, extractor, where)

    def score(
        self, pictures: Sequence[images.ImageInput], false_alarms: float = 0.05
    ) -> list[Verdict]:
        """Score pictures (see `fit`) and judge them.

        Raises
        ------
        UserError
            If `false_alarms` is too small a rate for the number of calibration pictures.
        """
        return [verdict for verdict, _, _ in self.examine(pictures, false_alarms)]

    def examine(
        self, pictures: Sequence[images.ImageInput], false_alarms: float
    ) -> Iterator[tuple[Verdict, ensembles.DataSetScores | None, int]]:
        """Yield the verdict on each picture, the scores it is part of, and its place in them."""
        self.threshold(false_alarms)  # an error before long work
        for first in range(0, len(pictures), matrices.IMAGES_AT_ONCE):
            part = pictures[first : first + matrices.IMAGES_AT_ONCE]
            read = list(images.preprocess_images(part, self.about["matrices"], first))
            whole = [matrix for matrix in read if not isinstance(matrix, errors.UserError)]
            scores = self._join(self._score_crops(whole)) if whole else None
            places = iter(range(len(whole)))
            for number, (picture, matrix) in enumerate(zip(part, read, strict=True), first):
                name = images.image_name(picture, number)
                if isinstance(matrix, errors.UserError):
                    yield Verdict(name, error=str(matrix)), None, 0
                    continue
                place = next(places)
                score = float(scores.final[place])
                n = len(self.calibration)
                p_value = (1 + int((self.calibration >= score).sum())) / (n + 1)
                levels = {level: float(own[place]) for level, own in scores.levels.items()}
                verdict = Verdict(name, score, p_value, p_value <= false_alarms, levels)
                yield verdict, scores, place
            if len(pictures) > matrices.IMAGES_AT_ONCE:
                log.info(f"{first + len(part)} of {len(pictures)} pictures")

    def threshold(self, false_alarms: float) -> float:
        """Return the score above which a picture is called anomalous."""
        n = len(self.calibration)
        n_above = math.floor(false_alarms * (n + 1) + 1e-9)
        if n_above < 1:
            raise errors.UserError(
                f"false_alarms must be at least 1 / ({n} + 1) for {n} good pictures, got "
                f"{false_alarms:g}; it takes {math.ceil(1 / false_alarms - 1e-9) - 1} good pictures"
            )
        return float(np.sort(self.calibration)[-n_above])

    # ------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the detector, whole or not at all; equal runs give equal bytes."""
        options = asdict(replace(self.options, num_workers=None))  # of the machine, not of scores
        about = {"format": FORMAT, "options": options, "about": self.about}
        arrays: dict[str, Any] = {"about": np.array(atomic.to_json(about))}
        for (level, n_crops), scores in self.crops.items():
            arrays[f"crops_{level}_{n_crops}"] = scores
        for key, own in self.positions.items():
            name = "_".join(map(str, key))
            arrays |= {
                f"ranges_{name}": own.ranges.numpy(),
                f"counts_{name}": own.counts,
                f"elements_{name}": np.array(own.n_elements),
            }
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        atomic.atomic_write(Path(path), buffer.getvalue())

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], weights: str | None = None, device: str = "auto"
    ) -> "Detector":
        """Read a detector; `weights` tells where the network's file is now.

        Raises
        ------
        UserError
            If the file is damaged or of another version, or the weights are others.
        """
        positions, crops = {}, {}
        try:
            with np.load(path, allow_pickle=False) as archive:
                record = json.loads(str(archive["about"]))
                arrays = {name: archive[name] for name in archive.files if name != "about"}
            if record["format"] == FORMAT:
                for name, array in arrays.items():
                    kind, _, place = name.partition("_")
                    key = tuple(map(int, place.split("_")))
                    if kind == "crops":
                        crops[key] = array
                    elif kind == "counts":
                        ranges = torch.from_numpy(arrays[f"ranges_{place}"])
                        positions[key] = Fitted(ranges, array, int(arrays[f"elements_{place}"]))
                options, about = DetectorOptions(**record["options"]), record["about"]
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except Exception as error:  # a cut zip raises BadZipFile, zlib.error, KeyError, ...
            raise errors.UserError(
                f"{path} must be a whole file of sinbad_detector.py fit, got a damaged one or "
                f"another ({type(error).__name__}); fit it again"
            ) from error
        if record["format"] != FORMAT:
            raise errors.UserError(
                f"{path} must be a detector of format {FORMAT}, got {record['format']}; fit it "
                "again with this version"
            )
        options, where = (
            replace(options, weights=weights or options.weights),
            backbones.choose_device(device),
        )
        extractor, sha256 = _load_network(options, where)
        if sha256 != about["weights_sha256"]:
            raise errors.UserError(
                f"weights must be those that {path} was fitted with (sha256 "
                f"{about['weights_sha256']}), got {options.weights} with {sha256}; pass --weights"
            )
        return cls(options, about, positions, crops, extractor, where)

    # ------------------------------------------------------------ scores

    def _score_crops(self, matrices: list[NDArray[np.uint8]]) -> dict[Grid, sinbad_utils.Scores]:
        """Return the crop scores of pictures, as `crops`; where there is only padding 0."""
        data_set = images.matrix_set(self.about["matrices"], test=np.stack(matrices))
        known = {
            key: list(own.ranges.to(self.device).unbind(1)) for key, own in self.positions.items()
        }
        plan = self.options.plan()
        scorer = scoring.ClassScorer(
            plan, {images.NAME: data_set}, self.extractor, self.device, known
        )
        crops = {key: np.zeros((*own.shape[:2], len(matrices))) for key, own in self.crops.items()}
        for job in scorer.crop_jobs(list(plan.tasks)):
            for task in job.tasks if not job.is_empty else []:
                own = self.positions[task.level, job.n_crops, job.crop]
                if not own.whitenings:
                    shrinkage = plan.descriptor(task.level).shrinkage
                    described = map(own.descriptors, range(len(own.counts)))
                    own.whitenings = [
                        sinbad_utils.fit_whitening(d.to(self.device), shrinkage) for d in described
                    ]
                descriptors = scorer.descriptors(job, task, "test")
                scores = own.whitenings[task.rep].nearest(descriptors)
                crops[task.level, job.n_crops][task.rep, job.crop] = scores
        return crops

    def _join(self, crops: dict[Grid, sinbad_utils.Scores]) -> ensembles.DataSetScores:
        """Ensemble crop scores (as `crops`), normalised by the calibration pictures'."""
        options = self.options
        where_crops_lie = {
            "matrices": self.about["matrices"],
            "initial_res": options.initial_res,
            "crop_num_edge": options.crop_num_edge,
        }
        files = []
        for task in options.plan().tasks:
            level, n_crops = key = options.grid(task)
            scores, valid = crops[key][task.rep], self.crops[key][task.rep]
            run = {"settings": {**where_crops_lie, "crop_size_ratio": task.ratio}}
            made = score_files.LevelScores(scores, valid, np.zeros(scores.shape[1]), [], run)
            files.append(ensembles.ScoreFile(Path(), level, (n_crops,), made))
        files.sort(key=lambda file: -file.grids[0])  # as they are read from a folder
        levels, n_reps = loco.network_levels(options.pyramid_level), options.rep_num_224
        return ensembles.join(
            images.NAME,
            files,
            ensembles.EnsembleOptions("", "", levels, 0, n_reps, options.lambda_factor),
        )


def _load_network(
    options: DetectorOptions, device: torch.device
) -> tuple[backbones.FeatureExtractor | None, str | None]:
    """Return the network and its weights' sha256; None and None for raw pixels alone."""
    levels = loco.network_levels(options.pyramid_level)
    if not levels:
        return None, None
    weights = backbones.load_weights(options.net, options.weights)
    backbone = backbones.build_backbone(options.net, weights, levels)
    extractor = backbones.FeatureExtractor(backbone, device, options.precision, options.compile)
    return extractor, weights.sha256


def _fit_positions(
    scorer: scoring.ClassScorer, options: DetectorOptions
) -> tuple[dict[Position, Fitted], dict[Grid, sinbad_utils.Scores]]:
    """Describe the training pictures at every crop position, and score the calibration ones."""
    plan, group = scorer.plan, scorer.groups[images.NAME, "train"]
    train, valid = (scorer.pool.ids[images.NAME, split] for split in ("train", "valid"))
    positions, crops = {}, {}
    for task in plan.tasks:
        n_crops = options.grid(task)[1]
        crops[options.grid(task)] = np.zeros((task.rep + 1, n_crops, len(valid or train)))
    for job in scorer.crop_jobs(list(plan.tasks)):
        for level in job.builders:
            shrinkage, key = plan.descriptor(level).shrinkage, (level, job.n_crops)
            own = [task for task in job.tasks if task.level == level]
            described = [scorer.descriptors(job, task, "train") for task in own]
            ranges = next(b.ranges for b in job.builders[level] if b.group is group)
            n_elements = backbones.INPUT_SIDE**2 if level == loco.PIXEL_LEVEL else level**2
            counts = (torch.stack(described).double() * n_elements).round().cpu().numpy()
            positions[level, job.n_crops, job.crop] = Fitted(
                torch.stack([torch.stack(pair).cpu() for pair in ranges], dim=1),
                counts.astype(np.uint8 if n_elements <= 255 else np.uint16),
                n_elements,
            )
            for task, descriptors in zip(own, described, strict=True):
                if valid:
                    whitening = sinbad_utils.fit_whitening(descriptors, shrinkage)
                    scores = whitening.nearest(scorer.descriptors(job, task, "valid"))
                else:
                    scores = fold_scores(descriptors, shrinkage, options.folds, options.seed)
                crops[key][task.rep, job.crop] = scores
    return positions, crops


def fold_scores(
    descriptors: Tensor, shrinkage: float, n_folds: int, seed: int
) -> sinbad_utils.Scores:
    """Score each training descriptor (n, p) by the whitening and neighbours of the other folds."""
    n_train = len(descriptors)
    fold_of = np.random.default_rng(seed).permutation(n_train) % min(n_folds, n_train // 2)
    scores = np.empty(n_train)
    for fold in range(fold_of.max() + 1):
        own = torch.from_numpy(fold_of == fold).to(descriptors.device)
        whitening = sinbad_utils.fit_whitening(descriptors[~own], shrinkage)
        scores[fold_of == fold] = whitening.nearest(descriptors[own])
    return scores
