"""Drawings of a juice bottle and a box of pushpins, normal and defective, with their masks.

Everything is drawn from an image's own random seed; no photograph is used.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter

from loco_datasets import KINDS, LOCO_CLASSES

Points = NDArray[np.float64]
Place = Callable[[ArrayLike], Points]  # maps points of a thing into the image
Colour = tuple[int, int, int]

DRAWING_VERSION = 2  # to be raised with every change of the pictures
OVERSAMPLING = 2  # pixels drawn per pixel written, each way
# Split, kind of image; the position is part of an image's random seed.
FOLDERS = [("train", "good"), ("validation", "good"), ("test", "good")]
FOLDERS += [("test", kind) for kind in KINDS.values()]
# Kind -> defect -> (pixel value, saturation threshold: full-size pixels, 1.0 = the whole region).
# juice_bottle's as in LOCO's defects_config.json; pushpins' in its manner.
DEFECTS: dict[str, dict[str, dict[str, tuple[int, float]]]] = {
    "juice_bottle": {
        "logical_anomalies": {
            "wrong_juice_type": (240, 4500),
            "missing_top_label": (255, 70400),
            "swapped_labels": (253, 140800),
            "wrong_fill_level_not_enough": (245, 1.0),
            "empty_bottle": (247, 1.0),
        },
        "structural_anomalies": {"damaged_label": (252, 1.0), "contamination": (238, 1.0)},
    },
    "pushpins": {
        "logical_anomalies": {"missing_pushpin": (253, 9000), "1_additional_pushpin": (255, 9000)},
        "structural_anomalies": {
            "front_bent": (251, 1.0),
            "broken": (250, 1.0),
            "contamination": (248, 1.0),
        },
    },
}
# Colours of a juice in the body, where light falls in at the top, and at the bottom.
JUICES: dict[str, tuple[Colour, Colour, Colour]] = {
    "orange": ((188, 146, 34), (214, 188, 84), (128, 98, 18)),
    "banana": ((190, 176, 134), (222, 216, 186), (146, 128, 88)),
    "cherry": ((98, 32, 22), (132, 56, 44), (60, 16, 10)),
}
LETTERS = ["3974", "1793", "28", "3179", "3145479"]  # JUICE, as strokes between keys of a telephone


class Canvas:
    """An image and its mask, drawn in the pixels of LOCO's full-size images."""

    def __init__(self, class_name: str, scale: float, background: Colour) -> None:
        full = LOCO_CLASSES[class_name]
        size = [max(1, round(side * scale)) * OVERSAMPLING for side in (full.width, full.height)]
        self.factor = np.array(size) / (full.width, full.height)
        self.image = Image.new("RGB", (size[0], size[1]), background)
        self.mask = Image.new("L", self.image.size)

    def fill(self, points: ArrayLike, colour: Colour, opacity: float = 1, blur: float = 0) -> None:
        """Fill a polygon; `blur` is the radius of its soft edge in full-size pixels."""
        corners = np.asarray(points) * self.factor  # (corners, 2)
        radius = float(blur * self.factor[0])
        low = np.floor(corners.min(0) - 3 * radius).astype(int)
        high = np.ceil(corners.max(0) + 3 * radius).astype(int) + 1
        stencil = Image.new("L", tuple((high - low).tolist()))
        ImageDraw.Draw(stencil).polygon((corners - low).ravel().tolist(), round(255 * opacity))
        if blur:
            stencil = stencil.filter(ImageFilter.GaussianBlur(radius))
        self.image.paste(colour, tuple(low.tolist()), stencil)

    def stroke(self, points: ArrayLike, colour: Colour, width: float) -> None:
        """Draw a line through the points; `width` in full-size pixels."""
        corners = (np.asarray(points) * self.factor).ravel().tolist()
        thickness = max(1, round(width * self.factor[0]))
        ImageDraw.Draw(self.image).line(corners, colour, thickness, joint="curve")

    def mark(self, points: ArrayLike, value: int) -> None:
        """Mark a polygon as defect in the mask."""
        corners = np.asarray(points) * self.factor
        ImageDraw.Draw(self.mask).polygon(corners.ravel().tolist(), value)

    def develop(self, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
        """Return image and mask at their final size, under random light and with camera noise."""
        pixels = np.asarray(self.image.reduce(OVERSAMPLING), dtype=np.float64)
        light = rng.normal(1, 0.03) + rng.normal(0, 0.006, 3)
        pixels = pixels * light + rng.normal(0, 2, pixels.shape)
        # The largest value of a block: no defect vanishes from the mask, however small.
        drawn, steps = np.asarray(self.mask), range(OVERSAMPLING)
        blocks = [drawn[y::OVERSAMPLING, x::OVERSAMPLING] for y in steps for x in steps]
        mask = np.maximum.reduce(blocks)
        return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)), Image.fromarray(mask)


def _placer(x: float, y: float, angle: float = 0.0) -> Place:
    """Return what turns points around the origin (radians, clockwise), then moves it to (x, y)."""
    cos, sin = np.cos(angle), np.sin(angle)
    return lambda points: np.asarray(points) @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


def _ellipse(x: float, y: float, radius_x: float, radius_y: float) -> Points:
    """Return the corners of an ellipse."""
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return np.stack([x + radius_x * np.cos(turn), y + radius_y * np.sin(turn)], 1)


def _box(x: float, y: float, half_width: float, half_height: float, power: float = 0) -> Points:
    """Return the outline of a box; a power above 0 rounds its corners."""
    unit = _ellipse(0, 0, 1, 1)
    unit = np.sign(unit.round(6)) * np.abs(unit) ** power
    return unit * (half_width, half_height) + (x, y)


def _draw_blob(canvas: Canvas, rng: np.random.Generator, x: float, y: float, value: int) -> None:
    """Draw and mark a contamination: an uneven dark speck."""
    wobble = np.repeat(rng.uniform(0.7, 1.25, 10), 4)[:, None]
    blob = _ellipse(0, 0, rng.uniform(20, 38), rng.uniform(14, 26)) * wobble
    blob = _placer(x, y, rng.uniform(0, np.pi))(blob)
    canvas.fill(blob, (60, 46, 34), 0.9, blur=2)
    canvas.mark(blob, value)


def _bottle(x: float, top: float, bottom: float, inset: float) -> Points:
    """Return the outline of the bottle between two heights, `inset` pixels inside the glass."""
    y = np.linspace(top, bottom, 90)
    shoulder = np.clip((y - 510) / 170, 0, 1)
    half = 113 + 77 * shoulder**2 * (3 - 2 * shoulder) - inset
    half = half - 26 * np.clip((y - bottom + 30) / 30, 0, 1) ** 2
    return np.concatenate([np.stack([x - half, y], 1), np.stack([x + half, y], 1)[::-1]])


def _draw_glass_and_juice(canvas: Canvas, x: float, level: float | None, fruit: str) -> None:
    """Draw the bottle, filled up to the height `level` (None: empty)."""
    canvas.fill([(0, 1440), (800, 1440), (800, 1600), (0, 1600)], (17, 17, 19), blur=12)
    canvas.fill(_bottle(x, 270, 1485, 0), (92, 95, 102), blur=2)
    canvas.fill(_bottle(x, 270, 1482, 7), (24, 25, 29), blur=3)
    if level is not None:
        body, lit, deep = JUICES[fruit]
        canvas.fill(_bottle(x, level, 1440, 18), body)
        canvas.fill(_bottle(x, 1180, 1425, 70), deep, 0.7, blur=45)
        canvas.fill(_bottle(x, level + 5, 690, 28), lit, 0.7, blur=22)
        canvas.fill(_ellipse(x, level, 94, 7), lit)
    for side, opacity in ((-1, 0.5), (1, 0.3)):  # reflections along both edges
        edge = x + side * 166
        canvas.fill(_box(edge, 1050, 7, 340), (225, 228, 235), opacity, blur=5)
        canvas.fill(_box(x + side * 95, 440, 4, 90), (225, 228, 235), opacity, blur=3)
    canvas.fill(_ellipse(x - 40, 640, 70, 9), (250, 250, 250), 0.35, blur=6)
    canvas.fill(_box(x, 205, 112, 80, 0.2), (46, 48, 54), blur=2)
    for y in (140, 178, 214, 262):
        canvas.fill(_ellipse(x, y, 130, 15), (108, 112, 120), 0.8, blur=2)
        canvas.fill(_ellipse(x, y + 5, 118, 9), (34, 36, 42), 0.9, blur=2)


def _draw_fruit(canvas: Canvas, fruit: str, place: Place) -> None:
    """Draw a fruit of about 100 x 100 pixels."""
    dark = (70, 30, 10)
    if fruit == "orange":
        canvas.fill(place(_ellipse(0, 8, 47, 45)), dark)
        canvas.fill(place(_ellipse(0, 8, 44, 42)), (238, 130, 30))
        canvas.fill(place(_ellipse(-12, -4, 18, 16)), (255, 190, 90), 0.8, blur=7)
        canvas.fill(place([(4, -34), (-30, -50), (-56, -34), (-28, -24)]), (30, 92, 40))
    elif fruit == "banana":
        turn = np.linspace(0.1, 1.9, 24)
        for shift in (-22, 0, 22):
            outer = np.stack([58 * np.cos(turn) - 22, 58 * np.sin(turn) - 32 + shift], 1)
            inner = np.stack([54 * np.cos(turn) - 30, 34 * np.sin(turn) - 36 + shift], 1)[::-1]
            finger = place(np.concatenate([outer, inner, outer[:1]]))
            canvas.fill(finger, (214, 200, 40))
            canvas.stroke(finger, dark, 4)
    else:
        for side in (-1, 1):
            stem = [(26 * side, 18), (10 * side - 4, -22), (-4, -52)]
            canvas.stroke(place(stem), (60, 70, 20), 5)
            canvas.fill(place(_ellipse(27 * side, 28, 26, 26)), dark)
            canvas.fill(place(_ellipse(27 * side, 28, 23, 23)), (170, 24, 30))


def _draw_label(canvas: Canvas, fruit: str | None, place: Place) -> None:
    """Draw the label with a fruit, or the one with the text (None)."""
    height = 135 if fruit else 64
    canvas.fill(place(_box(0, 0, 138, height)), (236, 176, 66))
    canvas.fill(place(_box(0, height / 6, 100, height / 2)), (250, 232, 132), 0.8, blur=height / 4)
    border = place(_box(0, 0, 122, height - 14, 0.25))
    canvas.stroke(np.concatenate([border, border[:1]]), (92, 62, 24), 3)
    if fruit:
        _draw_fruit(canvas, fruit, place)
        return
    for position, letter in enumerate(LETTERS):
        keys = np.array([int(key) - 1 for key in letter])
        strokes = np.stack([keys % 3 * 13 + 40 * position - 93, keys // 3 * 23 - 23], 1)
        canvas.stroke(place(strokes), (38, 30, 24), 8)


def _tear_label(canvas: Canvas, rng: np.random.Generator, place: Place, value: int) -> None:
    """Tear the print off a lower corner of the label with the fruit."""
    side, share = rng.choice([-1, 1]), np.linspace(0, 1, 9)
    width, height = rng.uniform(70, 120), rng.uniform(60, 110)
    edge = np.stack([138 - width * (1 - share), 135 - height * share], 1)
    edge[1:-1] += rng.normal(0, 5, (7, 2))
    torn = place(np.concatenate([edge, [(138.0, 135.0)]]) * (side, 1))
    canvas.fill(torn, (222, 214, 202))
    canvas.mark(torn, value)


def draw_juice_bottle(
    canvas: Canvas, rng: np.random.Generator, defect: str | None, value: int
) -> None:
    """Draw a bottle: fruit label above, fitting the juice, text label below; mark the defect."""
    x, level, low_level = 395 + rng.normal(0, 12), rng.uniform(372, 408), rng.uniform(520, 780)
    juice, wrong_fruit = rng.permutation(list(JUICES))[:2].tolist()
    heights = {"empty_bottle": None, "wrong_fill_level_not_enough": low_level}
    _draw_glass_and_juice(canvas, x, heights.get(str(defect), level), juice)
    if defect in heights:
        canvas.mark(_bottle(x, level, heights[defect] or 1440, 18), value)
    swapped = defect == "swapped_labels"
    top, low = (
        _placer(x + rng.normal(-8, 8), y + rng.normal(0, 9), rng.normal(0, 0.02))
        for y in ((1210, 780) if swapped else (842, 1273))
    )
    if defect != "missing_top_label":
        _draw_label(canvas, wrong_fruit if defect == "wrong_juice_type" else juice, top)
    _draw_label(canvas, None, low)
    if defect in ("missing_top_label", "swapped_labels"):
        canvas.mark(top(_box(0, 0, 138, 135)), value)
    if swapped:
        canvas.mark(low(_box(0, 0, 138, 64)), value)
    elif defect == "wrong_juice_type":
        canvas.mark(top(_ellipse(0, 0, 55, 55)), value)
    elif defect == "damaged_label":
        _tear_label(canvas, rng, top, value)
    elif defect == "contamination":
        _draw_blob(canvas, rng, x + rng.uniform(-120, 120), rng.uniform(600, 1380), value)


def _draw_pin(
    canvas: Canvas, rng: np.random.Generator, place: Place, defect: str, value: int
) -> None:
    """Draw a pushpin 210 pixels long, needle to the right; mark its defect."""
    bend = rng.choice([-1, 1]) * rng.uniform(35, 55) if defect == "front_bent" else 0.0
    needle = [(20, 0), (60, 0), (110 - abs(bend) / 3, bend)]
    half = [(-95, 36), (-82, 38), (-76, 22), (-20, 19), (-6, 34), (8, 42), (16, 40), (24, 10)]
    if defect == "broken":
        half = [(-35, 16), *half[3:]]
    side = np.array(half, dtype=float)
    head = np.concatenate([side, side[::-1] * (1, -1)])
    if defect == "broken":
        head = np.concatenate([head, [(-22.0, -9.0), (-40.0, 0.0), (-24.0, 8.0)]])
        canvas.mark(place(_box(-65, 0, 45, 38)), value)
    if bend:
        canvas.mark(place([(52, -12), (52, 12), (122, bend + 12), (122, bend - 12)]), value)
    canvas.fill(np.add(place(head), (7, 12)), (60, 62, 66), 0.55, blur=9)
    canvas.stroke(np.add(place(needle), (5, 8)), (128, 130, 134), 6)
    canvas.stroke(place(needle), (86, 88, 94), 8)
    canvas.stroke(place(needle) - (1, 2), (205, 207, 212), 3)
    canvas.fill(place(head), (176, 126, 10))
    canvas.fill(place(head * (0.96, 0.88)), (232, 186, 24), blur=3)
    if defect != "broken":
        canvas.fill(place(_box(-40, -8, 28, 4)), (255, 242, 160), 0.8, blur=4)
    canvas.fill(place(_box(6, -14, 4, 14)), (255, 242, 160), 0.7, blur=4)


def draw_pushpins(canvas: Canvas, rng: np.random.Generator, defect: str | None, value: int) -> None:
    """Draw a box of 3 x 5 compartments with one pushpin each, all alike; mark the defect."""
    shift_x, shift_y = rng.normal(0, 8, 2)
    canvas.fill(_box(850 + shift_x, 500 + shift_y, 800, 450, 0.1), (214, 216, 216), blur=5)
    odd_one = rng.integers(15)
    for number in range(15):
        x, y = 850 + shift_x + (number % 5 - 2) * 312, 500 + shift_y + (number // 5 - 1) * 290
        cell = _box(x, y, 148, 137, 0.15)
        canvas.fill(cell, (118, 122, 126), blur=3)
        canvas.fill(_box(x + 3, y + 4, 140, 129, 0.15), (176, 179, 180), blur=5)
        canvas.fill(_ellipse(x - 40, y - 40, 50, 40), (205, 208, 208), 0.5, blur=25)
        fault = str(defect) if number == odd_one else "none"
        angle, (right, down) = rng.normal(0, 0.15), rng.uniform(-16, 16, 2)
        if fault in ("missing_pushpin", "1_additional_pushpin"):
            canvas.mark(cell, value)
        if fault != "missing_pushpin":
            _draw_pin(canvas, rng, _placer(x + right, y + down, angle), fault, value)
        if fault == "1_additional_pushpin":
            over = _placer(x - right, y - down, angle + rng.uniform(0.5, 2.6))
            _draw_pin(canvas, rng, over, fault, value)
        if fault == "contamination":
            _draw_blob(canvas, rng, x + rng.uniform(-90, 90), y + rng.uniform(-80, 80), value)


def draw_image(
    class_name: str, folder: int, index: int, seed: int, scale: float
) -> tuple[Image.Image, Image.Image]:
    """Return an image and its mask; they depend on these arguments alone.

    Parameters
    ----------
    class_name : juice_bottle or pushpins
    folder : position in FOLDERS; the kind of image
    index : number of the image in its folder; the defects take turns
    seed : any whole number from 0
    scale : share of LOCO's width and height, in ]0, 1]
    """
    rng = np.random.default_rng([seed, list(DEFECTS).index(class_name), folder, index])
    defects = list(DEFECTS[class_name].get(FOLDERS[folder][1], {"": (0, 0)}).items())
    name, (value, _) = defects[index % len(defects)]
    bottle = class_name == "juice_bottle"
    canvas = Canvas(class_name, scale, (7, 7, 9) if bottle else (62, 66, 70))
    (draw_juice_bottle if bottle else draw_pushpins)(canvas, rng, name or None, value)
    return canvas.develop(rng)


def defects_config(class_name: str, scale: float) -> list[dict[str, object]]:
    """Return the content of a class' defects_config.json at this scale."""
    return [
        {
            "defect_name": name,
            "pixel_value": value,
            "saturation_threshold": 1.0 if limit == 1 else max(1, round(limit * scale**2)),
            "relative_saturation": limit == 1,
        }
        for defects in DEFECTS[class_name].values()
        for name, (value, limit) in defects.items()
    ]
