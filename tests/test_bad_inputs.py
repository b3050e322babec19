"""Wrong input: one line that begins with `error:`, exit status 2, nothing written."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from bad_places import Case, ensemble_case, fails, matrices_case, scores_case, write_scores
from conftest import IM_SIZE, Place, draw_class, draw_image, files_below


def check(case: Case, words: list[str], place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Hold the one error line to the words that it must contain; nothing is written."""
    line = fails(case, capsys)
    for word in words:
        assert any(choice in line for choice in word.split("|")), line
    assert files_below(place.out) == {}


# ---------------------------------------------------------------- images and folders


def no_such_folder(place: Place) -> Case:
    return matrices_case(place, place.root / "nowhere")


def empty_folder(place: Place) -> Case:
    (place.root / "empty").mkdir()
    return matrices_case(place, place.root / "empty")


def class_without_test_good(place: Place) -> Case:
    images = place.images()
    shutil.rmtree(images / "pushpins/test/good")
    return matrices_case(place, images)


def png_cut_in_half(place: Place) -> Case:
    images = place.images()
    path = images / "pushpins/test/good/001.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return matrices_case(place, images)


def text_named_png(place: Place) -> Case:
    images = place.images()
    (images / "pushpins/train/good/002.png").write_text("no image")
    return matrices_case(place, images)


def images_of_two_aspects(place: Place) -> Case:
    images = place.images()
    path = images / "pushpins/train/good/002.png"
    draw_image("train/good", 2, (50, 85)).save(path)
    return matrices_case(place, images)


def a_class_named_like_a_data_set(place: Place) -> Case:
    draw_class(place.root / "images" / "own_loco")
    return matrices_case(place, place.root / "images")


def matrices_folder_is_a_file(place: Place) -> Case:
    (place.root / "file").touch()
    return matrices_case(place, place.drawn, "--out_dir", str(place.root / "file"))


# ---------------------------------------------------------------- matrices


def no_matrices(place: Place) -> Case:
    return scores_case(place, data=place.root / "nowhere")


def authors_matrices_with_nan(place: Place) -> Case:
    folder = place.data() / "pushpins_loco"
    (folder / "image_paths.json").unlink()
    images = np.load(folder / "train_data.npy").astype(np.float32) / 255
    images[1, 0, 3, 3] = np.nan
    np.save(folder / "train_data.npy", images)
    return scores_case(place, "--pyramid_level", "224", data=folder.parent)


def npy(array: np.ndarray) -> bytes:
    """Return the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


TRAIN, VALID, TEST = (f"{split}_data.npy" for split in ("train", "valid", "test"))
LABELS, PATHS = "image_level_label.npy", "image_paths.json"
DAMAGES: list[tuple[str, Callable[[bytes], bytes], list[str]]] = [
    (TEST, lambda old: old[:-1000], ["be a complete .npy file", "--overwrite"]),
    (TRAIN, lambda old: b"", ["be a complete .npy file", "--overwrite"]),
    (VALID, lambda old: old.replace(b"}", b" ", 1), ["be a complete .npy file", "--overwrite"]),
    (VALID, lambda old: npy(np.load(io.BytesIO(old)).astype(int)), ["uint8", "got int64"]),
    (VALID, lambda old: npy(np.zeros((0, 3, IM_SIZE, IM_SIZE), np.uint8)), ["got (0, 3, 64, 64)"]),
    (LABELS, lambda old: npy(np.zeros(3)), ["hold 5 labels, 0 or 1, got 3"]),
    (PATHS, lambda old: old[:40], ["be JSON", "--overwrite"]),
    (PATHS, lambda old: b'{"train": 5}', ["be JSON with train", "--overwrite"]),
]


@pytest.mark.parametrize(("name", "change", "words"), DAMAGES)
def test_damaged_matrices(
    name: str,
    change: Callable[[bytes], bytes],
    words: list[str],
    place: Place,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = place.data() / "pushpins_loco" / name
    path.write_bytes(change(path.read_bytes()))
    case = scores_case(place, data=place.root / "data")
    check(case, [f"{name} must", *words], place, capsys)


# ---------------------------------------------------------------- flags


SCORE_FLAGS = {
    "--pyramid_level 8": ["pyramid_level must be", "56", "224", "got 8"],
    "--mvtype teapots": ["mvtype must", "got teapots"],
    "--initial_res 128": ["initial_res must", "64, got 128", "--initial_res 64"],
    "--net resnet19": ["net must be", "torchvision", "timm", "got resnet19"],
    "--shrinkage_factor -0.5": ["--shrinkage_factor", "above 0 to 1, got -0.5"],
    "--crop_size_ratio 0": ["--crop_size_ratio", "above 0 and below 1, got 0"],
    "--crop_size_ratio 1.5": ["--crop_size_ratio", "above 0 and below 1, got 1.5"],
    "--crop_size_ratio .001": ["crops and their stride must be at least 1 pixel", "0.001"],
    "--crop_size_ratio .5 .33": ["0.5 and 0.33", "9_crop_anom_maps.npz", "--version_name"],
    "--batch_size 0": ["--batch_size", "at least 1, got 0"],
    "--rep 5-2": ["--rep", "got 5-2"],
    "--device cuda:99": ["of this machine", "got cuda:99"],
    "--device abacus": ["device must be auto, cpu, cuda", "got abacus"],
    "--results_dir /proc/sinbad --pyramid_level 224": ["/proc/sinbad"],
    "--results_dir /dev/null --pyramid_level 224": ["/dev/null", "choose|check"],
}
MATRIX_FLAGS = {
    "--im_size 0": ["--im_size", "at least 8, got 0"],
    "--im_sise 64": ["--im_sise", "--help"],
}


@pytest.mark.parametrize("flags", [*SCORE_FLAGS, *MATRIX_FLAGS])
def test_bad_flags(flags: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    if flags in SCORE_FLAGS:
        check(scores_case(place, *flags.split()), SCORE_FLAGS[flags], place, capsys)
    else:
        case = matrices_case(place, place.drawn, *flags.split())
        check(case, MATRIX_FLAGS[flags], place, capsys)
    assert not Path("/proc/sinbad").exists()


# ---------------------------------------------------------------- weights


def changed_state(change: Callable[[dict[str, torch.Tensor]], object]) -> dict[str, torch.Tensor]:
    """Return a state_dict of resnet18 with a change."""
    state = torchvision.models.resnet18(weights=None).state_dict()
    change(state)
    return state


WEIGHT = "layer3.0.conv1.weight"
WEIGHTS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "a list": (lambda: [1, 2], ["weights must hold a state_dict"]),
    "of a deeper net": (
        lambda: torchvision.models.resnet34(weights=None).state_dict(),
        ["weights must be of the net", "also holds layer1.2.conv1.weight"],
    ),
    "of another net": (
        lambda: torchvision.models.resnet50(weights=None).state_dict(),
        ["weights must be of the net", "--net"],
    ),
    "without a tensor": (
        lambda: changed_state(lambda state: state.pop(WEIGHT)),
        ["weights must be of the net and levels", f"lacks {WEIGHT}"],
    ),
    "with NaN": (
        lambda: changed_state(lambda state: state[WEIGHT][0, 0].fill_(float("nan"))),
        ["no finite floating-point values", f"in {WEIGHT}"],
    ),
    "that overflow": (
        lambda: changed_state(lambda state: state[WEIGHT].fill_(1e38)),
        ["features must be finite", "train/good/000.png", "level 14"],
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_bad_weights(name: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = WEIGHTS[name]
    torch.save(make(), place.root / "weights.pth")
    in_line = [] if name == "that overflow" else ["weights.pth"]
    case = scores_case(place, "--weights", str(place.root / "weights.pth"))
    check(case, [*words, *in_line], place, capsys)


def no_weights_file(place: Place) -> Case:
    return scores_case(place, "--weights", str(place.root / "none.pth"))


def weights_no_torch_file(place: Place) -> Case:
    path = place.root / "text.pth"
    path.write_text("no weights")
    return scores_case(place, "--weights", str(path))


# ---------------------------------------------------------------- ensemble


def no_scores_at_all(place: Place) -> Case:
    return ensemble_case(place, "--mvtype", "all")


def scores_of_one_level_missing(place: Place) -> Case:
    write_scores(place, 7, 1)
    return ensemble_case(place)


def scores_of_one_grid_missing(place: Place) -> Case:
    for level, n_crops in ((7, 1), (7, 4), (14, 1)):
        write_scores(place, level, n_crops)
    return ensemble_case(place)


def ensemble_labels_of_another_length(place: Place) -> Case:
    for level in (7, 14):
        write_scores(place, level, 1)
    folder = place.root / "runs/v_pyramid_lvl_14/rep_num_0/pushpins_loco"
    np.save(folder / "lbl.npy", np.zeros(3))
    return ensemble_case(place)


def levels_of_other_images(place: Place) -> Case:
    write_scores(place, 7, 1)
    write_scores(place, 14, 1, n_test=6)
    return ensemble_case(place)


def damage_scores(place: Place, **arrays: np.ndarray) -> Case:
    """Replace arrays of a file of scores of 4 crops."""
    for level in (7, 14):
        write_scores(place, level, 4)
    path = place.root / "runs/v_pyramid_lvl_14/rep_num_0/pushpins_loco/4_crop_anom_maps.npz"
    with np.load(path) as archive:
        np.savez(path, **{**archive, **arrays})
    return ensemble_case(place)


def scores_with_nan(place: Place) -> Case:
    return damage_scores(place, anom_map_test=np.full((4, 4), np.nan))


def scores_of_fewer_crops_than_named(place: Place) -> Case:
    return damage_scores(place, anom_map_test=np.ones((1, 4)), anom_map_valid=np.ones((1, 3)))


def scores_of_one_axis(place: Place) -> Case:
    return damage_scores(place, anom_map_valid=np.ones(4))


def scores_with_a_record_of_another_kind(place: Place) -> Case:
    return damage_scores(place, run=np.array("[]"))


def negative_lambda(place: Place) -> Case:
    return ensemble_case(place, "--lambda_factor", "-1")


CASES: dict[Callable[[Place], Case], list[str]] = {
    no_such_folder: ["dataset_dir must", "no such folder", "mvtec.com", "9e7c84dba550"],
    empty_folder: ["dataset_dir must", "nothing in it"],
    class_without_test_good: ["pushpins must hold test/good", "got test/logical_anomalies"],
    png_cut_in_half: ["test/good/001.png must be a complete image file"],
    text_named_png: ["train/good/002.png must be a complete image file"],
    images_of_two_aspects: ["002.png must have the aspect ratio 1700 x 1000", "got 50 x 85"],
    a_class_named_like_a_data_set: ["must not end in _loco or _struct", "got own_loco", "rename"],
    matrices_folder_is_a_file: ["file", "choose|check"],
    no_matrices: ["nowhere", "python data_to_matrices.py --mvtype pushpins"],
    authors_matrices_with_nan: ["must hold k/255"],
    no_weights_file: ["weights must be imagenet, random or a file", "none.pth"],
    weights_no_torch_file: ["weights must be a file written by torch.save", "text.pth"],
    no_scores_at_all: ["version must hold scores", "sinbad_single_layer.py"],
    scores_of_one_level_missing: ["lvl_14", "--pyramid_level 14"],
    scores_of_one_grid_missing: ["must be consistent in numbers of crops", "got 4", "level|lvl_14"],
    ensemble_labels_of_another_length: ["lbl.npy must hold 4 labels", "got 3"],
    levels_of_other_images: ["must be consistent in labels", "lvl_7", "lvl_14"],
    scores_with_nan: ["4_crop_anom_maps.npz must be a complete file of scores", "NaN"],
    scores_of_fewer_crops_than_named: ["4_crop_anom_maps.npz must be", "1 and 1 crops"],
    scores_of_one_axis: ["4_crop_anom_maps.npz must be", "anom_map_valid is float64 of shape (4,)"],
    scores_with_a_record_of_another_kind: ["4_crop_anom_maps.npz must be", "no record"],
    negative_lambda: ["--lambda_factor", "got -1"],
}


@pytest.mark.parametrize("prepare", CASES, ids=lambda prepare: prepare.__name__)
def test_bad_input(
    prepare: Callable[[Place], Case], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    check(prepare(place), CASES[prepare], place, capsys)
