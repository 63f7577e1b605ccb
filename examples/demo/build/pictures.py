"""Generated pictures of one large object on a plain background, with captions.

A picture is decided by a `Scene` and drawn with PIL at four times its size, then averaged down. The same
seed always gives the same pictures.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SHAPES = ("circle", "square", "triangle", "cross", "star")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 134, 20),
    "yellow": (250, 220, 40),
    "green": (40, 160, 70),
    "blue": (40, 90, 215),
    "purple": (130, 50, 170),
}
BACKGROUNDS = {
    "white": (242, 242, 240),
    "black": (24, 24, 28),
    "gray": (132, 132, 136),
    "pink": (250, 178, 205),
}
NEW_WORD = "wug"
"""The thing the base model never sees: a thick ring, in any of the known colours."""

WORDS = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "cross": ("cross", "cross", "plus"),
    "star": ("star",),
    "purple": ("purple", "purple", "violet"),
    "gray": ("gray", "gray", "grey"),
}
TEMPLATES = (
    "a {colour} {shape} on a {background} background",
    "a {colour} {shape} on {background}",
    "{colour} {shape}, {background} background",
    "a picture of a {colour} {shape} on a {background} background",
    "a drawing of a {colour} {shape} in front of a {background} background",
    "{background} background, {colour} {shape}",
    "one {colour} {shape}, {background}",
)
PARTIAL = (
    "a {colour} {shape}",
    "a {shape} on a {background} background",
    "a {shape}",
    "something {colour} on a {background} background",
    "a {background} background",
)


@dataclass(frozen=True)
class Scene:
    """What is in a picture; lengths in pixels of a 64-pixel picture, `angle` in degrees."""

    shape: str
    colour: str
    background: str
    radius: float = 20.0
    x: float = 32.0
    y: float = 32.0
    angle: float = 0.0
    tint: tuple[int, int, int] = (0, 0, 0)
    ground_tint: tuple[int, int, int] = (0, 0, 0)


def random_scene(rng: random.Random, shapes: tuple[str, ...] = SHAPES) -> Scene:
    """One scene with every choice drawn evenly; small jitter of size, place, angle and both colours."""
    radius = rng.uniform(16.5, 22.0)
    room = 31.0 - radius
    return Scene(
        shape=rng.choice(shapes),
        colour=rng.choice(tuple(COLOURS)),
        background=rng.choice(tuple(BACKGROUNDS)),
        radius=radius,
        x=32.0 + rng.uniform(-0.5, 0.5) * room,
        y=32.0 + rng.uniform(-0.5, 0.5) * room,
        angle=rng.uniform(-8.0, 8.0),
        tint=_tint(rng, 8),
        ground_tint=_tint(rng, 6),
    )


def _tint(rng: random.Random, amount: int) -> tuple[int, int, int]:
    return (rng.randint(-amount, amount), rng.randint(-amount, amount), rng.randint(-amount, amount))


def caption(scene: Scene, rng: random.Random | None = None, *, partial: float = 0.0) -> str:
    """A caption of `scene`; without `rng` the first template and the plain words.

    With probability `partial` the caption leaves something out.
    """
    names = {"shape": scene.shape, "colour": scene.colour, "background": scene.background}
    if rng is None:
        return TEMPLATES[0].format(**names)
    template = rng.choice(PARTIAL) if rng.random() < partial else rng.choice(TEMPLATES)
    words = {key: rng.choice(WORDS.get(name, (name,))) for key, name in names.items()}
    return template.format(**words)


def _regular(corners: int, outer: float, inner: float | None, start: float) -> list[tuple[float, float]]:
    points = []
    steps = corners if inner is None else 2 * corners
    for index in range(steps):
        distance = outer if inner is None or index % 2 == 0 else inner
        turn = math.radians(start) + 2 * math.pi * index / steps
        points.append((distance * math.sin(turn), -distance * math.cos(turn)))
    return points


def outline(shape: str, radius: float, angle: float) -> list[tuple[float, float]]:
    """Corners of a polygon shape around (0, 0), turned by `angle` degrees."""
    if shape == "square":
        return _regular(4, radius * 1.28, None, 45.0 + angle)
    if shape == "triangle":
        return [(x, y + 0.18 * radius) for x, y in _regular(3, radius * 1.28, None, angle)]
    if shape == "star":
        return [(x, y + 0.06 * radius) for x, y in _regular(5, radius * 1.28, radius * 0.52, angle)]
    if shape != "cross":
        raise ValueError(f"no outline for {shape!r}")
    long, short = radius * 1.06, radius * 0.36
    corner = [(short, long), (short, short), (long, short)]
    points = [(sx * a, sy * b) for (a, b), sx, sy in zip(corner, (1, 1, 1), (-1, -1, -1), strict=True)]
    points += [(a, b) for a, b in reversed(corner)]
    points += [(-a, b) for a, b in corner]
    points += [(-a, -b) for a, b in reversed(corner)]
    turn = math.radians(angle)
    return [(x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)) for x, y in points]


def draw(scene: Scene, size: int = SIZE) -> Image.Image:
    """The picture, RGB, `size` x `size`."""
    zoom = 4 * size / 64
    ground = _shifted(BACKGROUNDS[scene.background], scene.ground_tint)
    colour = _shifted(COLOURS[scene.colour], scene.tint)
    image = Image.new("RGB", (4 * size, 4 * size), ground)
    pencil = ImageDraw.Draw(image)
    x, y, radius = scene.x * zoom, scene.y * zoom, scene.radius * zoom
    if scene.shape in ("circle", NEW_WORD):
        pencil.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        if scene.shape == NEW_WORD:
            hole = 0.52 * radius
            pencil.ellipse((x - hole, y - hole, x + hole, y + hole), fill=ground)
    else:
        pencil.polygon([(x + a, y + b) for a, b in outline(scene.shape, radius, scene.angle)], fill=colour)
    return image.resize((size, size), Image.Resampling.BOX)


def _shifted(colour: tuple[int, int, int], tint: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, a + b)) for a, b in zip(colour, tint, strict=True))
    return red, green, blue


def pixels(scenes: list[Scene], size: int = SIZE) -> np.ndarray:
    """The drawn scenes as uint8 [N, 3, size, size]."""
    return np.stack([np.asarray(draw(scene, size)) for scene in scenes]).transpose(0, 3, 1, 2).copy()


def known_grid() -> list[Scene]:
    """Every shape, colour and background once, centred: 120 scenes."""
    return [Scene(shape, colour, background) for shape in SHAPES for colour in COLOURS for background in BACKGROUNDS]


def new_scenes(count: int, seed: int) -> list[Scene]:
    """`count` scenes of the new thing; colours and backgrounds take turns so that all occur."""
    rng = random.Random(seed)
    pairs = [(colour, background) for colour in COLOURS for background in BACKGROUNDS]
    rng.shuffle(pairs)
    scenes = []
    for index in range(count):
        colour, background = pairs[index % len(pairs)]
        scenes.append(replace(random_scene(rng, (NEW_WORD,)), colour=colour, background=background))
    return scenes
