"""Synthetic images of a juice bottle and a box of pushpins, normal and anomalous, with masks.

Each image is rendered from its own random seed; no photograph is used. Normal images vary in
light, camera noise, position and angle of every object, fill level and fruit. Lengths are in pixels
of LOCO's full-size images.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter

Points = NDArray[np.float64]  # (corners, 2), x and y
Pose = Callable[[ArrayLike], Points]  # maps points of an object into the image
Colour = tuple[int, int, int]

VERSION = 3  # to be raised with every change of the images
SIZES = {"juice_bottle": (800, 1600), "pushpins": (1700, 1000)}  # LOCO's width and height
OVERSAMPLING = 2  # rendered pixels per image pixel, along each axis
# Category -> anomaly type -> defect -> its value in the mask.
DEFECTS = {
    "juice_bottle": {
        "logical_anomalies": {
            "wrong_juice_type": 240,
            "missing_top_label": 255,
            "swapped_labels": 253,
            "wrong_fill_level_not_enough": 245,
            "empty_bottle": 247,
        },
        "structural_anomalies": {"damaged_label": 252, "contamination": 238},
    },
    "pushpins": {
        "logical_anomalies": {"missing_pushpin": 253, "1_additional_pushpin": 255},
        "structural_anomalies": {"front_bent": 251, "broken": 250, "contamination": 248},
    },
}
JUICES = {"orange": (206, 150, 30), "banana": (200, 186, 144), "cherry": (104, 34, 24)}


class Canvas:
    """An image and the mask of its defect, whose pixels have the same value."""

    def __init__(self, category: str, scale: float, value: int) -> None:
        size = [max(1, round(side * scale)) * OVERSAMPLING for side in SIZES[category]]
        self.factor = np.array(size) / SIZES[category]
        self.image = Image.new("RGB", (size[0], size[1]), (44, 47, 52))
        self.mask, self.value = Image.new("L", self.image.size), value

    def fill(self, points: ArrayLike, colour: Colour, opacity: float = 1, blur: float = 0) -> None:
        """Fill a polygon; `blur` is the radius of its soft edge."""
        corners = np.asarray(points) * self.factor
        radius = float(blur * self.factor[0])
        low = np.floor(corners.min(0) - 3 * radius).astype(int)
        high = np.ceil(corners.max(0) + 3 * radius).astype(int) + 1
        stencil = Image.new("L", tuple((high - low).tolist()))
        ImageDraw.Draw(stencil).polygon((corners - low).ravel().tolist(), round(255 * opacity))
        if blur:
            stencil = stencil.filter(ImageFilter.GaussianBlur(radius))
        self.image.paste(colour, tuple(low.tolist()), stencil)

    def mark(self, points: ArrayLike) -> None:
        """Mark a polygon as part of the defect."""
        corners = (np.asarray(points) * self.factor).ravel().tolist()
        ImageDraw.Draw(self.mask).polygon(corners, self.value)

    def develop(self, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
        """Return image and mask at their final size, with random light and camera noise."""
        pixels = np.asarray(self.image.reduce(OVERSAMPLING), dtype=np.float64)
        light = rng.normal(1, 0.004) + rng.normal(0, 0.001, 3)
        pixels = pixels * light + rng.normal(0, 2, pixels.shape)
        mask = np.asarray(self.mask)[::OVERSAMPLING, ::OVERSAMPLING]
        image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
        return image, Image.fromarray(mask)


def _pose(x: float, y: float, angle: float = 0.0) -> Pose:
    """Return a rotation around the origin (radians, clockwise), then a shift to (x, y)."""
    cos, sin = np.cos(angle), np.sin(angle)
    return lambda points: np.asarray(points) @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


def _shape(x: float, y: float, half_width: float, half_height: float, power: float = 0) -> Points:
    """Return the outline of a box; a power above 0 rounds it, 1 makes it an ellipse."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    unit = np.stack([np.cos(angle), np.sin(angle)], 1).round(6)
    return np.sign(unit) * np.abs(unit) ** power * (half_width, half_height) + (x, y)


def _draw_blob(canvas: Canvas, rng: np.random.Generator, x: float, y: float) -> None:
    """Draw and mark a contamination: an uneven green spot."""
    wobble = np.repeat(rng.uniform(0.7, 1.25, 10), 4)[:, None]
    blob = _shape(0, 0, rng.uniform(60, 90), rng.uniform(45, 65), 1) * wobble
    blob = _pose(x, y, rng.uniform(0, np.pi))(blob)
    canvas.fill(blob, (40, 104, 60), 0.95, blur=2)
    canvas.mark(blob)


def _bottle(x: float, top: float, bottom: float, inset: float) -> Points:
    """Return the outline of the bottle between two heights, `inset` inside the glass."""
    y = np.clip((top, 510, 680, 1440, bottom), top, bottom)
    half = np.interp(y, (510, 680, 1440, 1485), (113, 190, 190, 166)) - inset
    return np.concatenate([np.stack([x - half, y], 1), np.stack([x + half, y], 1)[::-1]])


_ARC = _shape(0, 0, 1, 1, 1)[:12]
_BANANA = np.concatenate([_ARC * (130, 140), _ARC[::-1] * (118, 70)]) - (50, 62)
# Print on a label -> colour and parts.
PRINTS: dict[str, tuple[Colour, list[Points]]] = {
    "text": ((50, 30, 16), [_shape(0, line, 84, 7) for line in (-26, 0, 26)]),
    "orange": ((238, 130, 30), [_shape(0, 0, 84, 84, 1)]),
    "banana": ((214, 200, 40), [_BANANA]),
    "cherry": (
        (170, 24, 30),
        [
            *(_shape(x, 46, 42, 42, 1) for x in (-45, 45)),
            *(np.array([(x, 30), (-10, -90), (2, -90)]) for x in (-44, 44)),
        ],
    ),
}


def _draw_label(canvas: Canvas, name: str, pose: Pose) -> None:
    """Draw a label, with a text (which is lower) or with a fruit."""
    height = 64 if name == "text" else 135
    canvas.fill(pose(_shape(0, 0, 138, height)), (236, 176, 66))
    canvas.fill(pose(_shape(0, 0, 122, height - 14, 0.25)), (250, 232, 150))
    colour, parts = PRINTS[name]
    for part in parts:
        canvas.fill(pose(part), colour)


def _draw_juice_bottle(canvas: Canvas, rng: np.random.Generator, defect: str) -> None:
    """Draw a bottle: a label of its fruit above, a text label below; mark the defect."""
    x, level = 395 + rng.normal(0, 10), rng.uniform(372, 408)
    juice, wrong_fruit = rng.permutation(list(JUICES))[:2].tolist()
    heights = {"empty_bottle": 1440, "wrong_fill_level_not_enough": rng.uniform(620, 1000)}
    canvas.fill(_shape(x, 205, 118, 85, 0.2), (92, 96, 104), blur=2)
    canvas.fill(_bottle(x, 270, 1485, 0), (92, 95, 102), blur=2)
    canvas.fill(_bottle(x, 270, 1482, 7), (24, 25, 29), blur=3)
    if defect != "empty_bottle":
        canvas.fill(_bottle(x, heights.get(defect, level), 1440, 18), JUICES[juice])
    for side in (-1, 1):  # reflections along both edges
        canvas.fill(_shape(x + side * 166, 1050, 7, 340), (225, 228, 235), 0.4, blur=5)
    swapped = defect == "swapped_labels"
    top, low = (
        _pose(x + rng.normal(-8, 6), y + rng.normal(0, 7), rng.normal(0, 0.02))
        for y in ((1273, 842) if swapped else (842, 1273))
    )
    if defect != "missing_top_label":
        _draw_label(canvas, wrong_fruit if defect == "wrong_juice_type" else juice, top)
    _draw_label(canvas, "text", low)
    if defect in heights:
        canvas.mark(_bottle(x, level, heights[defect], 18))
    elif defect in ("missing_top_label", "swapped_labels", "wrong_juice_type"):
        for pose in (top, low) if swapped else (top,):
            canvas.mark(pose(_shape(0, 0, 138, 135)))
    elif defect == "damaged_label":
        side = rng.choice([-1, 1])
        torn = top(np.array([(138, -rng.uniform(40, 135)), (138, 135), (-60, 135)]) * (side, 1))
        canvas.fill(torn, (222, 214, 202))
        canvas.mark(torn)
    elif defect == "contamination":
        _draw_blob(canvas, rng, x + rng.uniform(-120, 120), rng.uniform(600, 1380))


def _draw_pin(canvas: Canvas, pose: Pose, defect: str) -> None:
    """Draw a pushpin 390 long, needle to the right; mark its defect."""
    needle = [(30, -13), (220, -13), (220, 13), (30, 13)]
    half = [(-170, 66), (-148, 69), (-137, 40), (-36, 34), (-11, 62), (14, 76), (29, 72), (43, 18)]
    if defect == "front_bent":
        needle = [(30, -13), (118, -13), (80, 155), (54, 149), (86, 13), (30, 13)]
        canvas.mark(pose(_shape(135, 75, 95, 90)))
    elif defect == "broken":
        half = [(-50, 24), *half[3:]]
        canvas.mark(pose(_shape(-110, 0, 75, 70)))
    side = np.array(half, dtype=float)
    head = np.concatenate([side, side[::-1] * (1, -1)])
    canvas.fill(np.add(pose(head), (9, 15)), (60, 62, 66), 0.55, blur=9)
    canvas.fill(pose(needle), (112, 114, 120))
    canvas.fill(pose(head), (176, 126, 10))
    canvas.fill(pose(head * (0.96, 0.88)), (232, 186, 24), blur=3)


def _draw_pushpins(canvas: Canvas, rng: np.random.Generator, defect: str) -> None:
    """Draw a box of 2 x 3 compartments with one pushpin each; mark the defect."""
    box_x, box_y = rng.normal((850, 500), 6)
    canvas.fill(_shape(box_x, box_y, 810, 470, 0.1), (214, 216, 216), blur=5)
    defective = rng.integers(6)
    for number, pin_rng in enumerate(rng.spawn(6)):
        x, y = box_x + (number % 3 - 1) * 525, box_y + (number // 3 - 0.5) * 450
        cell = _shape(x, y, 250, 214, 0.15)
        canvas.fill(cell, (118, 122, 126), blur=3)
        canvas.fill(_shape(x + 3, y + 4, 240, 204, 0.15), (176, 179, 180), blur=5)
        fault = defect if number == defective else ""
        angle, (right, down) = pin_rng.normal(0, 0.08), pin_rng.uniform(-14, 14, 2)
        if fault == "missing_pushpin":
            canvas.mark(cell)
        elif fault == "1_additional_pushpin":
            _draw_pin(canvas, _pose(x + right, y + down + 80, angle), "")
            _draw_pin(canvas, _pose(x - right, y - down - 80, -angle), "")
            canvas.mark(cell)
        else:
            _draw_pin(canvas, _pose(x + right, y + down, angle), fault)
        if fault == "contamination":
            blob_y = y + pin_rng.choice([-1, 1]) * pin_rng.uniform(100, 140)
            _draw_blob(canvas, pin_rng, x + pin_rng.uniform(-120, 120), blob_y)


def draw_image(
    category: str, split: str, folder: str, index: int, seed: int, scale: float
) -> tuple[Image.Image, Image.Image]:
    """Return an image and its mask; they depend on these arguments alone.

    Parameters
    ----------
    category : juice_bottle or pushpins
    split, folder : the names of LOCO's folders, such as test and logical_anomalies
    index : number of the image in its folder, from 0; it chooses the defect in turn
    seed : at least 0
    scale : image width and height as a fraction of LOCO's, in (0, 1]
    """
    rng = np.random.default_rng([seed, index, *f"{category}/{split}/{folder}".encode()])
    defects = list(DEFECTS[category].get(folder, {"": 0}).items())
    defect, value = defects[index % len(defects)]
    canvas = Canvas(category, scale, value)
    draw = _draw_juice_bottle if category == "juice_bottle" else _draw_pushpins
    draw(canvas, rng, defect)
    return canvas.develop(rng)
