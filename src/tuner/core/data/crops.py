"""Which part of an image a visit sees."""

from __future__ import annotations

from dataclasses import replace

from tuner.core.config import CropConfig
from tuner.core.data.records import Fit, ImageRecord, Size
from tuner.core.errors import UsageError
from tuner.core.rng import Rng


def crop_offset(record: ImageRecord, fit: Fit, crop: CropConfig, rng: Rng | None) -> tuple[int, int]:
    """(left, top) of the part of the resized image that is kept.

    rng: names the draw of style ``random``; None for the centre instead. Raises UsageError when style ``face`` finds no
    face in the file name.
    """
    if crop.style == "corner":
        return 0, 0
    room = fit.resized[0] - fit.bucket[0], fit.resized[1] - fit.bucket[1]
    if crop.style == "random" and rng is not None:
        return rng.child("left").integers(room[0] + 1), rng.child("top").integers(room[1] + 1)
    if crop.style == "face":
        return _around_face(record, fit, room)
    return fit.crop


def _around_face(record: ImageRecord, fit: Fit, room: Size) -> tuple[int, int]:
    if record.face is None:
        raise UsageError(
            "an image names no face",
            where=record.name,
            why='crop.style "face" reads _centreX_centreY_width_height at the end of the file name',
            fix="rename the image, or use another crop.style",
        )
    wanted = (
        round(record.face[axis] * fit.resized[axis] / record.size[axis] - fit.bucket[axis] / 2) for axis in (0, 1)
    )
    left, top = (min(max(place, 0), most) for place, most in zip(wanted, room, strict=True))
    return left, top


def zoomed(record: ImageRecord, fit: Fit, crop: CropConfig, rng: Rng | None) -> Fit:
    """``fit``, or with ``crop.face_range`` a larger resized image, of which the crop then keeps less around the face.

    The shorter side of the crop is drawn to be ``face_range`` times the larger side of the face. The image always
    covers the crop, and is not enlarged beyond that. rng: names the draw; None takes the middle.
    """
    if crop.face_range is None or record.face is None:
        return fit
    cover = max(fit.bucket[axis] / record.size[axis] for axis in (0, 1))
    wanted = (min(fit.bucket) / (max(record.face[2:]) * ratio) for ratio in crop.face_range)
    largest, smallest = (max(cover, min(1.0, scale)) for scale in wanted)
    share = 0.5 if rng is None else rng.child("zoom").random()
    scale = smallest + (largest - smallest) * share
    width, height = (max(fit.bucket[axis], round(record.size[axis] * scale)) for axis in (0, 1))
    return replace(fit, resized=(width, height))
