"""Wrong input: one line that begins with `error:`, exit status 2, nothing written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from bad_places import Case, ensemble_case, fails, matrices_case, scores_case, write_scores
from conftest import IM_SIZE, Place, draw_class, draw_image, files_below

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


def tiny_im_size(place: Place) -> Case:
    return matrices_case(place, place.drawn, "--im_size", "0")


def unknown_flag(place: Place) -> Case:
    return matrices_case(place, place.drawn, "--im_sise", "64")


# ---------------------------------------------------------------- matrices


def no_matrices(place: Place) -> Case:
    return scores_case(place, data=place.root / "nowhere")


def matrices_of_another_size(place: Place) -> Case:
    return scores_case(place, "--initial_res", "128")


def npy_cut_short(place: Place) -> Case:
    data = place.data()
    path = data / "pushpins_loco/test_data.npy"
    path.write_bytes(path.read_bytes()[:-1000])
    return scores_case(place, data=data)


def empty_npy(place: Place) -> Case:
    data = place.data()
    (data / "pushpins_loco/train_data.npy").write_bytes(b"")
    return scores_case(place, data=data)


def labels_of_another_length(place: Place) -> Case:
    data = place.data()
    np.save(data / "pushpins_loco/image_level_label.npy", np.zeros(3))
    return scores_case(place, data=data)


def json_cut_short(place: Place) -> Case:
    data = place.data()
    path = data / "pushpins_loco/image_paths.json"
    path.write_text(path.read_text()[:40])
    return scores_case(place, data=data)


def json_of_another_kind(place: Place) -> Case:
    data = place.data()
    (data / "pushpins_loco/image_paths.json").write_text('{"train": 5}')
    return scores_case(place, data=data)


def npy_with_a_damaged_header(place: Place) -> Case:
    data = place.data()
    path = data / "pushpins_loco/valid_data.npy"
    path.write_bytes(path.read_bytes().replace(b"}", b" ", 1))
    return scores_case(place, data=data)


def matrices_of_whole_numbers(place: Place) -> Case:
    data = place.data()
    path = data / "pushpins_loco/valid_data.npy"
    images = np.load(path).astype(np.int64)
    path.unlink()  # it may be linked
    np.save(path, images)
    return scores_case(place, data=data)


def matrices_of_no_validation_image(place: Place) -> Case:
    data = place.data()
    path = data / "pushpins_loco/valid_data.npy"
    path.unlink()
    np.save(path, np.zeros((0, 3, IM_SIZE, IM_SIZE), np.uint8))
    return scores_case(place, data=data)


def authors_matrices_with_nan(place: Place) -> Case:
    data = place.data()
    folder = data / "pushpins_loco"
    (folder / "image_paths.json").unlink()
    images = np.load(folder / "train_data.npy").astype(np.float32) / 255
    images[1, 0, 3, 3] = np.nan
    (folder / "train_data.npy").unlink()
    np.save(folder / "train_data.npy", images)
    return scores_case(place, "--pyramid_level", "224", data=data)


# ---------------------------------------------------------------- flags of the scores


def unknown_level(place: Place) -> Case:
    return scores_case(place, "--pyramid_level", "8")


def unknown_data_set(place: Place) -> Case:
    return scores_case(place, "--mvtype", "teapots")


def unknown_net(place: Place) -> Case:
    return scores_case(place, "--net", "resnet19")


def negative_shrinkage(place: Place) -> Case:
    return scores_case(place, "--shrinkage_factor", "-0.5")


def crop_ratio_zero(place: Place) -> Case:
    return scores_case(place, "--crop_size_ratio", "0")


def crop_ratio_above_one(place: Place) -> Case:
    return scores_case(place, "--crop_size_ratio", "1.5")


def crop_of_no_pixel(place: Place) -> Case:
    return scores_case(place, "--crop_size_ratio", "0.001")


def batch_size_zero(place: Place) -> Case:
    return scores_case(place, "--batch_size", "0")


def repetitions_backwards(place: Place) -> Case:
    return scores_case(place, "--rep", "5-2")


def device_that_is_not_there(place: Place) -> Case:
    return scores_case(place, "--device", "cuda:99")


def unknown_device(place: Place) -> Case:
    return scores_case(place, "--device", "abacus")


def two_ratios_of_one_file_name(place: Place) -> Case:
    return scores_case(place, "--crop_size_ratio", ".5", ".33")


# ---------------------------------------------------------------- weights


def no_weights_file(place: Place) -> Case:
    return scores_case(place, "--weights", str(place.root / "none.pth"))


def weights_no_torch_file(place: Place) -> Case:
    path = place.root / "text.pth"
    path.write_text("no weights")
    return scores_case(place, "--weights", str(path))


def weights_no_state_dict(place: Place) -> Case:
    torch.save([1, 2], place.root / "list.pth")
    return scores_case(place, "--weights", str(place.root / "list.pth"))


def weights_of_another_net(place: Place) -> Case:
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, place.root / "resnet18.pth")
    return scores_case(place, "--net", "resnet50", "--weights", str(place.root / "resnet18.pth"))


def weights_of_a_deeper_net(place: Place) -> Case:
    state = torchvision.models.resnet34(weights=None).state_dict()
    torch.save(state, place.root / "resnet34.pth")
    return scores_case(place, "--weights", str(place.root / "resnet34.pth"))


def weights_without_a_stage(place: Place) -> Case:
    state = torchvision.models.resnet18(weights=None).state_dict()
    kept = {name: value for name, value in state.items() if not name.startswith("layer3")}
    torch.save(kept, place.root / "to_layer2.pth")
    return scores_case(place, "--weights", str(place.root / "to_layer2.pth"))


def weights_with_nan(place: Place) -> Case:
    state = torchvision.models.resnet18(weights=None).state_dict()
    state["layer3.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, place.root / "nan.pth")
    return scores_case(place, "--weights", str(place.root / "nan.pth"))


def weights_that_overflow(place: Place) -> Case:
    state = torchvision.models.resnet18(weights=None).state_dict()
    state["layer3.0.conv1.weight"].fill_(1e38)
    torch.save(state, place.root / "large.pth")
    return scores_case(place, "--weights", str(place.root / "large.pth"))


# ---------------------------------------------------------------- output


def results_folder_is_a_file(place: Place) -> Case:
    (place.root / "file").touch()
    return scores_case(place, "--results_dir", str(place.root / "file"), "--pyramid_level", "224")


def matrices_folder_is_a_file(place: Place) -> Case:
    (place.root / "file").touch()
    return matrices_case(place, place.drawn, "--out_dir", str(place.root / "file"))


def results_folder_in_proc(place: Place) -> Case:
    return scores_case(place, "--results_dir", "/proc/sinbad", "--pyramid_level", "224")


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
    tiny_im_size: ["--im_size", "from 8, got 0"],
    unknown_flag: ["--im_sise", "--help"],
    no_matrices: ["nowhere", "python data_to_matrices.py --mvtype pushpins"],
    matrices_of_another_size: ["initial_res must", "64, got 128", "--initial_res 64"],
    npy_cut_short: ["test_data.npy must be a complete .npy file", "--overwrite"],
    empty_npy: ["train_data.npy must be a complete .npy file", "--overwrite"],
    labels_of_another_length: ["image_level_label.npy must hold 5 labels, 0 or 1, got 3"],
    json_cut_short: ["image_paths.json must be JSON", "--overwrite"],
    json_of_another_kind: ["image_paths.json must be JSON with train", "--overwrite"],
    npy_with_a_damaged_header: ["valid_data.npy must be a complete .npy file", "--overwrite"],
    matrices_of_whole_numbers: ["valid_data.npy must be uint8", "got int64"],
    matrices_of_no_validation_image: [
        "valid_data.npy must be (n, 3, 64, 64)",
        "got (0, 3, 64, 64)",
    ],
    authors_matrices_with_nan: ["must hold k/255"],
    unknown_level: ["pyramid_level must be", "56", "224", "got 8"],
    unknown_data_set: ["mvtype must", "got teapots"],
    unknown_net: ["net must be", "torchvision", "timm", "got resnet19"],
    negative_shrinkage: ["--shrinkage_factor", "above 0 to 1, got -0.5"],
    crop_ratio_zero: ["--crop_size_ratio", "above 0 and below 1, got 0"],
    crop_ratio_above_one: ["--crop_size_ratio", "above 0 and below 1, got 1.5"],
    crop_of_no_pixel: ["must be at least 1 pixel", "0.001"],
    batch_size_zero: ["--batch_size", "from 1, got 0"],
    repetitions_backwards: ["--rep", "got 5-2"],
    device_that_is_not_there: ["of this machine", "got cuda:99"],
    unknown_device: ["device must be auto, cpu, cuda", "got abacus"],
    two_ratios_of_one_file_name: ["0.5 and 0.33", "9_crop_anom_maps.npz", "--version_name"],
    no_weights_file: ["weights must be imagenet, random or a file", "none.pth"],
    weights_no_torch_file: ["weights must be a file written by torch.save", "text.pth"],
    weights_no_state_dict: ["weights must hold a state_dict", "list.pth"],
    weights_of_another_net: ["weights must be of the net", "resnet18.pth", "--net"],
    weights_of_a_deeper_net: ["weights must be of the net", "also holds layer1.2.conv1.weight"],
    weights_without_a_stage: ["weights must be of the net and levels", "lacks layer3"],
    weights_with_nan: ["no finite floating-point values", "in layer3.0.conv1.weight"],
    weights_that_overflow: ["features must be finite", "train/good/000.png", "level 14"],
    results_folder_is_a_file: ["file", "choose|check"],
    matrices_folder_is_a_file: ["file", "choose|check"],
    results_folder_in_proc: ["/proc/sinbad"],
    no_scores_at_all: ["version must hold scores", "sinbad_single_layer.py"],
    scores_of_one_level_missing: ["lvl_14", "--pyramid_level 14"],
    scores_of_one_grid_missing: ["must be consistent in numbers of crops", "got 4", "level|lvl_14"],
    ensemble_labels_of_another_length: ["lbl.npy must hold 4 labels", "got 3"],
    levels_of_other_images: ["must be consistent in labels", "lvl_7", "lvl_14"],
    scores_with_nan: ["4_crop_anom_maps.npz must be a whole file of scores", "NaN"],
    scores_of_fewer_crops_than_named: ["4_crop_anom_maps.npz must be", "1 and 1 crops"],
    scores_of_one_axis: ["4_crop_anom_maps.npz must be", "anom_map_valid is float64 of shape (4,)"],
    scores_with_a_record_of_another_kind: ["4_crop_anom_maps.npz must be", "no record"],
    negative_lambda: ["--lambda_factor", "got -1"],
}


@pytest.mark.parametrize("prepare", CASES, ids=lambda prepare: prepare.__name__)
def test_bad_input(
    prepare: Callable[[Place], Case], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(prepare(place), capsys)
    for words in CASES[prepare]:
        assert any(choice in line for choice in words.split("|"))
    assert files_below(place.out) == {}
    assert not Path("/proc/sinbad").exists()
