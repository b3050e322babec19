"""A detector for one's own images: fit once, save, load, score one image or a thousand.

The scores are the ensemble's of the step-by-step scripts, by the same code. What is kept of the
training images are their descriptors, see `stored_models`. Predictions are conformal: among normal
images exchangeable with the calibration set at most the fraction `false_alarms` is expected to be
called anomalous.
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
import PIL
import torch
from numpy.typing import NDArray

import sinbad_utils
from sinbad import (
    __version__,
    atomic,
    backbones,
    crops,
    devices,
    ensembles,
    errors,
    image_pool,
    images,
    scoring,
    settings,
    stored_models,
)
from sinbad.images import ImageInput
from sinbad.scoring import CropPosition, GridTask, Models, Repetition
from sinbad.settings import Settings
from sinbad.stored_models import Position, StoredModels
from sinbad_utils import CropModel, Scores

log = logging.getLogger(__name__)

FORMAT = 1  # of the file
MIN_TRAIN = 4  # images
MIN_SHIFTED = 10  # images; more than half of them lie beyond n = 20 calibration scores by chance in
# 0.04 % of cases: C(10, 6) / C(n + 10, 6), since the highest 6 must all be among these 10
COPY_SCORE = 1e-4  # of the calibration set's mean; lower ones are of training images alone
MACHINE_SETTINGS = ("device", "num_workers")  # not in the file
Grid = tuple[int, int]  # level, number of crops


@dataclass(frozen=True)
class Prediction:
    """What a detector says of one image.

    Attributes
    ----------
    path : of the image, or its number where it has none
    score : SINBAD's ensemble, higher = more anomalous; NaN for an unreadable image
    p_value : fraction of normal images expected to score as high
    is_anomalous : whether the p-value is at most the false-positive rate asked for
    levels : level -> normalised score
    error : why an image has no score, else ""
    """

    path: str
    score: float = math.nan
    p_value: float = math.nan
    is_anomalous: bool = False
    levels: dict[int, float] = field(default_factory=dict)
    error: str = ""


class Detector:
    """A fitted detector; made by `fit` or `load`.

    Attributes
    ----------
    values : its settings
    metadata : version, weights' sha256, how images are resized, numbers of images
    stored : (level, number of crops, crop) -> models; positions in the padding are missing
    calibration_crops : (level, number of crops) -> (n_reps, n_crops, n), crop scores of the
        calibration set
    calibration : (n,), its ensemble scores
    """

    def __init__(
        self,
        values: Settings,
        metadata: dict[str, Any],
        stored: dict[Position, StoredModels],
        calibration_crops: dict[Grid, Scores],
        extractor: backbones.FeatureExtractor | None,
    ) -> None:
        self.values, self.metadata, self.stored = values, metadata, stored
        self.calibration_crops, self.extractor = calibration_crops, extractor
        self.device = devices.choose_device(values.device)
        self._models: dict[tuple[Position, int], CropModel] = {}
        self.calibration = self._combine(calibration_crops).final

    @classmethod
    def fit(
        cls,
        train: Sequence[ImageInput],
        valid: Sequence[ImageInput] = (),
        values: Settings | None = None,
    ) -> "Detector":
        """Fit a detector on normal images.

        Parameters
        ----------
        train : paths, Pillow images or (height, width, 3) uint8 arrays, all of one aspect ratio
        valid : other normal images, for normalisation and calibration; if none are given the
            training images are scored in folds, each by the others
        values : what is computed, and on which device

        Raises
        ------
        UserError
            If an image cannot be read, there are too few, or they do not differ.
        """
        values = values or Settings()
        tasks = _tasks(values)
        if len(train) < MIN_TRAIN:
            raise errors.UserError(
                f"training images must be at least {MIN_TRAIN}, got {len(train)}; add some"
            )
        extractor, sha256 = _load_network(values)
        resizing = images.resize_settings(images.open_image(train[0]).size, values.initial_res)
        arrays = [
            images.preprocess_to_array(part, resizing) for part in (train, valid) if len(part)
        ]
        equal_ids = _number_equal_images(*arrays)
        names = [images.image_name(image, i) for i, image in enumerate([*train, *valid])]
        pool = _pool(arrays, names, resizing, values)
        train_ids, valid_ids = range(len(train)), range(len(train), len(train) + len(valid))
        folds = Folds(equal_ids, values.folds, values.seed)
        calibration = _empty_scores(tasks, values, len(valid) or len(folds.firsts))
        stored: dict[Position, StoredModels] = {}
        scorer = scoring.CropScorer(pool, values, extractor, "fit")
        splits = [valid_ids] if len(valid) else []
        for position, models, scores in scorer.score_positions(tasks, train_ids, splits):
            n_crops = len(position.grid)
            stored |= stored_models.store(position, models)
            for (level, _, rep), model in models.items():
                (crop_scores,) = scores[level, values.seed, rep] or [
                    folds.score(model.train_descriptors, values.at_level(level).shrinkage_factor)
                ]
                calibration[level, n_crops][rep, position.crop] = crop_scores
        metadata = {"sinbad": __version__, "matrices": resizing, "weights_sha256": sha256}
        metadata |= {"n_train": len(train), "n_valid": len(valid)}
        return cls(values, metadata, stored, calibration, extractor)

    def score(self, inputs: Sequence[ImageInput], false_alarms: float = 0.05) -> list[Prediction]:
        """Score images (see `fit`) and predict which are anomalous.

        Raises
        ------
        UserError
            If `false_alarms` is too small a rate for the size of the calibration set.
        """
        return [prediction for prediction, _, _ in self.iter_predictions(inputs, false_alarms)]

    def iter_predictions(
        self, inputs: Sequence[ImageInput], false_alarms: float
    ) -> Iterator[tuple[Prediction, ensembles.Ensemble | None, int]]:
        """Yield the prediction of each image, the ensemble it is part of, and its place there.

        Logs a warning after the last one if most lie beyond all calibration scores.
        """
        self.threshold(false_alarms)  # an error before long work
        n_copies = n_scored = n_beyond = 0
        for first in range(0, len(inputs), images.IMAGE_CHUNK):
            chunk = inputs[first : first + images.IMAGE_CHUNK]
            names = [images.image_name(image, number) for number, image in enumerate(chunk, first)]
            results = list(images.preprocess_images(chunk, self.metadata["matrices"], first))
            readable = [i for i, r in enumerate(results) if not isinstance(r, errors.UserError)]
            ensemble = None
            if readable:
                array = np.stack([results[i] for i in readable])
                ensemble = self._combine(self._score_crops(array, [names[i] for i in readable]))
                n_copies += int((ensemble.final < COPY_SCORE).sum())
                n_scored += len(readable)
                n_beyond += int((ensemble.final > self.calibration.max()).sum())
            for i, name in enumerate(names):
                if i not in readable:
                    yield Prediction(name, error=str(results[i])), None, 0
                    continue
                place = readable.index(i)
                yield self._predict(name, ensemble, place, false_alarms), ensemble, place
            if len(inputs) > images.IMAGE_CHUNK:
                log.info(f"{first + len(chunk)} of {len(inputs)} images")
        if n_copies:
            log.warning(
                f"{n_copies} images score 0: they are training images, or copies of some, and say "
                "nothing about the detector"
            )
        if n_scored >= MIN_SHIFTED and 2 * n_beyond > n_scored:
            log.warning(
                f"{n_beyond} of {n_scored} images score above all {len(self.calibration)} of the "
                "calibration set; unless most of them are anomalous, the light or the camera has "
                "changed since fit: fit again with normal images taken as these were"
            )

    def _predict(
        self, name: str, ensemble: ensembles.Ensemble, place: int, false_alarms: float
    ) -> Prediction:
        """Return the conformal prediction of one image of an ensemble."""
        score = float(ensemble.final[place])
        n_as_high = int((self.calibration >= score).sum())
        p_value = (1 + n_as_high) / (len(self.calibration) + 1)
        levels = {level: float(scores[place]) for level, scores in ensemble.levels.items()}
        return Prediction(name, score, p_value, p_value <= false_alarms, levels)

    def threshold(self, false_alarms: float) -> float:
        """Return the score above which an image is called anomalous."""
        n = len(self.calibration)
        try:
            rate = settings.number(0, 1, "()")(false_alarms)
        except ValueError as error:
            raise errors.UserError(f"false_alarms {error}") from None
        n_above = math.floor(rate * (n + 1) + 1e-9)
        if n_above < 1:
            raise errors.UserError(
                f"false_alarms must be at least 1 / ({n} + 1) for a calibration set of {n} images, "
                f"got {rate:g}; it takes {math.ceil(1 / rate - 1e-9) - 1} normal images"
            )
        return float(np.sort(self.calibration)[-n_above])

    # ------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the detector atomically; equal runs give equal bytes."""
        options = asdict(self.values)
        for name in MACHINE_SETTINGS:
            del options[name]
        record = {"format": FORMAT, "options": options, "about": self.metadata}
        arrays: dict[str, Any] = {"about": np.array(atomic.to_json(record))}
        for (level, n_crops), scores in self.calibration_crops.items():
            arrays[f"crops_{level}_{n_crops}"] = scores
        for key, models in self.stored.items():
            name = "_".join(map(str, key))
            arrays[f"ranges_{name}"], arrays[f"counts_{name}"] = models.ranges, models.counts
            arrays[f"elements_{name}"] = np.array(models.n_elements)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        atomic.atomic_write(Path(path), buffer.getvalue())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        weights: str | os.PathLike[str] | None = None,
        device: str = "auto",
        num_workers: int | None = None,
    ) -> "Detector":
        """Read a detector; `weights` is where the network's file lies now, if it was moved.

        Raises
        ------
        UserError
            If the file is damaged or of another version, or the weights are others.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                record = json.loads(str(archive["about"]))
                arrays = {name: archive[name] for name in archive.files if name != "about"}
            metadata, is_current = record["about"], record["format"] == FORMAT
            if is_current:
                values = Settings(**record["options"])
                stored, calibration = _parse_arrays(arrays, metadata, values)
        except MemoryError:
            raise
        except Exception as error:  # a cut zip raises BadZipFile, zlib.error, KeyError, ...
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the system, not of the file's content
            raise errors.UserError(
                f"{path} must be a complete file of sinbad_detector.py fit, got a damaged one or "
                f"another ({type(error).__name__}); fit it again"
            ) from error
        if not is_current:
            raise errors.UserError(
                f"{path} must be a detector of format {FORMAT}, got {record['format']}; fit it "
                "again"
            )
        weights = weights or values.weights
        values = replace(values, weights=weights, device=device, num_workers=num_workers)
        extractor, sha256 = _load_network(values)
        if sha256 != metadata["weights_sha256"]:
            raise errors.UserError(
                f"weights must be those that {path} was fitted with (sha256 "
                f"{metadata['weights_sha256']}), got {values.weights} with {sha256}; pass --weights"
            )
        if metadata["matrices"]["pillow"] != PIL.__version__:
            log.warning(
                f"{path} was fitted with Pillow {metadata['matrices']['pillow']}, this is "
                f"{PIL.__version__}: versions may resize differently; fit it again"
            )
        return cls(values, metadata, stored, calibration, extractor)

    # ------------------------------------------------------------ scores

    def _score_crops(self, array: NDArray[np.uint8], names: Sequence[str]) -> dict[Grid, Scores]:
        """Return the crop scores of preprocessed images, as `calibration_crops`."""
        pool = _pool([array], names, self.metadata["matrices"], self.values)
        values = replace(self.values, batch_size=self._batch_size(len(array)))
        scorer = scoring.CropScorer(pool, values, self.extractor, "score")
        tasks = _tasks(self.values)
        crop_scores = _empty_scores(tasks, self.values, len(array))
        n_models = len(self._models)
        positions = scorer.score_positions(tasks, (), [range(len(array))], self._models_at)
        for position, _, scores in positions:
            for (level, _, rep), (image_scores,) in scores.items():
                crop_scores[level, len(position.grid)][rep, position.crop] = image_scores
        if len(self._models) > n_models:
            devices.give_freed_memory_back()  # the holes that fitting leaves between models
        return crop_scores

    def _batch_size(self, n_images: int) -> int:
        """Return the crops of one forward pass; a CPU's bytes, and --compile, want it constant."""
        batch_size = scoring.batch_size_on(self.device, self.values)
        if self.device.type == "cpu" or self.values.compile:
            return batch_size
        n_positions = len({key[1:] for key in self.stored if key[0] != settings.PIXEL_LEVEL})
        return min(batch_size, max(1, n_positions * n_images))

    def _models_at(self, position: CropPosition, elements: scoring.Elements) -> Models:
        """Return the models of a crop position, fitted again at first use."""
        models = {}
        for repetition in position.repetitions:
            level, rep = repetition.level, repetition.rep
            key = level, len(position.grid), position.crop
            if (key, rep) not in self._models:
                channels = elements[level].shape[1]
                directions = scoring.directions_at(position, repetition, channels, self.values)
                at_level = self.values.at_level(level)
                model = self.stored[key].fit(rep, directions.to(self.device), at_level)
                self._models[key, rep] = self.stored[key].shrink(model)
            models[repetition] = self.stored[key].restore(self._models[key, rep], rep)
        return models

    def _combine(self, crop_scores: dict[Grid, Scores]) -> ensembles.Ensemble:
        """Ensemble crop scores, normalised by the calibration set's."""
        extent = _extent(self.metadata["matrices"])
        parts = []
        for ratio, (level, _, rep) in sorted(_tasks(self.values)):  # most crops first
            grid = self.values.grid(ratio)
            key = level, len(grid)
            arrays = crop_scores[key][rep], self.calibration_crops[key][rep]
            parts.append(ensembles.CropScores(level, *arrays, crops.Geometry(grid, extent)))
        levels = self.values.pyramid_level
        return ensembles.combine(sorted(parts, key=lambda p: levels.index(p.level)), self.values)


class Folds:
    """Training images in folds; each is scored by the whitening and neighbours of the others.

    Parameters
    ----------
    equal_ids : (n_train,) numbers of the images; equal images have one, and lie in one fold
    n_folds : at most half as many as there are different images
    seed : of the assignment

    Attributes
    ----------
    firsts : the first of each set of equal images; only these are in the calibration set
    """

    def __init__(self, equal_ids: NDArray[np.int64], n_folds: int, seed: int) -> None:
        n = equal_ids.max() + 1
        fold_of = np.random.default_rng(seed).permutation(n) % min(n_folds, n // 2)
        self.fold_of_image = fold_of[equal_ids]
        self.firsts = np.unique(equal_ids, return_index=True)[1]

    def score(self, descriptors: torch.Tensor, shrinkage: float) -> Scores:
        """Score the training descriptors (n_train, p); returns those of `firsts`."""
        scores = np.empty(len(descriptors))
        for fold in range(self.fold_of_image.max() + 1):
            held_out = self.fold_of_image == fold
            mask = torch.from_numpy(held_out).to(descriptors.device)
            neighbours = sinbad_utils.fit_whitening(descriptors[~mask], shrinkage)
            scores[held_out] = neighbours.nearest(descriptors[mask]).cpu().numpy()
        return scores[self.firsts]


# ---------------------------------------------------------------- parts of a detector


def _tasks(values: Settings) -> list[GridTask]:
    """Return what a detector computes; UserError for settings that no detector can have."""
    if values.official:
        raise errors.UserError(
            "official numerics are not supported by a detector: their ranges are those of a whole "
            "test split"
        )
    tasks, ratio_of = [], {}
    for ratio in values.crop_size_ratio:
        n_crops = len(values.grid(ratio))
        if ratio_of.setdefault(n_crops, ratio) != ratio:
            raise errors.UserError(
                f"crop_size_ratio must give grids of different sizes, got {ratio_of[n_crops]} and "
                f"{ratio}, both of {n_crops} crops; leave one out"
            )
    for level in settings.backbone_levels(values.pyramid_level):
        repetition = Repetition(level, values.seed, 0)
        tasks += [GridTask(ratio, repetition) for ratio in values.crop_size_ratio]
    if settings.PIXEL_LEVEL in values.pyramid_level:
        (ratio,) = settings.PIXEL_DEFAULTS.crop_ratios
        reps = range(values.rep_num_224)
        repetitions = [Repetition(settings.PIXEL_LEVEL, values.seed, rep) for rep in reps]
        tasks += [GridTask(ratio, repetition) for repetition in repetitions]
    return tasks


def _empty_scores(tasks: Sequence[GridTask], values: Settings, n: int) -> dict[Grid, Scores]:
    """Return zeros for the crop scores of `n` images, (n_reps, n_crops, n) of each grid."""
    shapes = {}
    for ratio, (level, _, rep) in tasks:
        n_crops = len(values.grid(ratio))
        shapes[level, n_crops] = rep + 1, n_crops, n
    return {grid: np.zeros(shape) for grid, shape in shapes.items()}


def _extent(resizing: dict[str, Any]) -> tuple[int, int]:
    """Return (width, height) in pixels of what is no padding."""
    return resizing["width"], resizing["height"]


def _pool(
    arrays: Sequence[NDArray[np.uint8]],
    names: Sequence[str],
    resizing: dict[str, Any],
    values: Settings,
) -> image_pool.ImagePool:
    """Pool the images of some arrays, one array after the other."""
    rows = [(array, row) for array in arrays for row in range(len(array))]
    device = devices.choose_device(values.device)
    return image_pool.ImagePool(rows, names, _extent(resizing), device, values.n_workers)


def _number_equal_images(
    train: NDArray[np.uint8], valid: Sequence[NDArray[np.uint8]] = ()
) -> NDArray[np.int64]:
    """Give each training image a number, equal images the same; warn of repeated images.

    UserError if there are too few different ones.
    """
    train_digests, valid_digests = (
        [hashlib.sha256(image).digest() for image in part] for part in (train, valid)
    )
    numbers = {digest: number for number, digest in enumerate(dict.fromkeys(train_digests))}
    if len(numbers) < MIN_TRAIN:
        raise errors.UserError(
            f"training images must be at least {MIN_TRAIN} different ones, got {len(numbers)} "
            f"among {len(train)}; add others"
        )
    if len(numbers) < len(train):
        log.warning(
            f"{len(train) - len(numbers)} training images are repeated: equal ones lie in one "
            "fold and count once for the false-positive rate"
        )
    n_shared = len(numbers.keys() & set(valid_digests))
    if n_shared:
        log.warning(
            f"{n_shared} validation images are training images too: they score near 0, so scores "
            "normalised by the validation mean are inflated"
        )
    return np.array([numbers[digest] for digest in train_digests])


def _load_network(values: Settings) -> tuple[backbones.FeatureExtractor | None, str | None]:
    """Return the network and its weights' sha256; None and None for raw pixels alone."""
    levels = settings.backbone_levels(values.pyramid_level)
    device = devices.choose_device(values.device)
    if not levels:
        return None, None
    weights = backbones.load_weights(values.net, values.weights)
    backbone = backbones.build_backbone(values.net, weights, levels)
    extractor = backbones.FeatureExtractor(backbone, device, values.precision, values.compile)
    return extractor, weights.sha256


def _parse_arrays(
    arrays: dict[str, NDArray[Any]], metadata: dict[str, Any], values: Settings
) -> tuple[dict[Position, StoredModels], dict[Grid, Scores]]:
    """Return the stored models and calibration scores of a file; an exception if any is missing."""
    stored, calibration = {}, {}
    width, height = _extent(metadata["matrices"])
    for ratio, (level, _, _) in _tasks(values):
        grid = values.grid(ratio)
        calibration[level, len(grid)] = arrays[f"crops_{level}_{len(grid)}"]
        for crop, (y, x) in enumerate(grid.corners):
            if x < width and y < height:
                name = f"{level}_{len(grid)}_{crop}"
                ranges, counts = arrays[f"ranges_{name}"], arrays[f"counts_{name}"]
                n_elements = int(arrays[f"elements_{name}"])
                stored[level, len(grid), crop] = StoredModels(ranges, counts, n_elements)
    floats = [*calibration.values(), *(models.ranges for models in stored.values())]
    if not all(np.isfinite(array).all() for array in floats):
        raise ValueError("NaN or infinity")
    return stored, calibration
