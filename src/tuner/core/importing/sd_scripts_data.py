"""Data sets of kohya-ss/sd-scripts: a TOML or JSON file, or folders named ``<repeats>_<class tokens>``.

A value is looked up in the subset, the data set, ``[general]`` and the command line, in this order. What comes out is
complete for every source, so nothing depends on what was inherited there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.core.config.jsonc import Path as JsonPath
from tuner.core.config.messages import nearest
from tuner.core.errors import UsageError
from tuner.core.importing.apply import Translation, read_flag
from tuner.core.importing.report import Row
from tuner.core.importing.sets import Part, SetDraft
from tuner.core.importing.source import Document, Given

GENERAL, DATASET, SUBSET, LINE = "general", "dataset", "subset", "command line"
_SHARED = (LINE, GENERAL, DATASET, SUBSET)
_SETS = (LINE, GENERAL, DATASET)


@dataclass(frozen=True, slots=True)
class DataOption:
    """One option of a data set. kind: its type in a file. key: the key in a set
    (``set.``) or source; empty when code decides. off: the value that asks for nothing."""

    kind: str
    levels: tuple[str, ...] = _SHARED
    key: str = ""
    off: Any = None
    note: str = ""


OPTIONS: Mapping[str, DataOption] = {
    "resolution": DataOption("size", _SETS, "set.resolution"),
    "batch_size": DataOption("int", _SETS, "set.batch_size"),
    "enable_bucket": DataOption("bool", _SETS, "set.buckets.enabled"),
    "min_bucket_reso": DataOption("int", _SETS, "set.buckets.min"),
    "max_bucket_reso": DataOption("int", _SETS, "set.buckets.max"),
    "bucket_reso_steps": DataOption("int", _SETS, "set.buckets.step"),
    "bucket_no_upscale": DataOption("bool", _SETS, "set.buckets.upscale"),
    "resize_interpolation": DataOption("text", _SHARED, "set.resize"),
    "random_crop": DataOption("bool", _SHARED, "set.crop.style", False),
    "face_crop_aug_range": DataOption("pair", _SHARED, "set.crop.face_range"),
    "network_multiplier": DataOption("number", _SETS, "adapter_strength", 1.0),
    "validation_split": DataOption("number", _SHARED, "validate.split", 0.0, "one share for all sets, by content"),
    "validation_seed": DataOption("int", _SHARED, "validate.seed"),
    "num_repeats": DataOption("int", _SHARED, "repeats", 1),
    "shuffle_caption": DataOption("bool", _SHARED, "captions.shuffle", False),
    "keep_tokens": DataOption("int", _SHARED, "captions.keep_first", 0),
    "keep_tokens_separator": DataOption("text", _SHARED, "captions.fixed_marker", ""),
    "secondary_separator": DataOption("text", _SHARED, "captions.group_separator", ""),
    "caption_separator": DataOption("text", _SHARED, "captions.separator", ","),
    "caption_prefix": DataOption("text", _SHARED, "captions.prefix", ""),
    "caption_suffix": DataOption("text", _SHARED, "captions.suffix", ""),
    "enable_wildcard": DataOption("bool", _SHARED, "captions.wildcards", False),
    "caption_dropout_rate": DataOption("number", _SHARED, "captions.dropout", 0),
    "caption_dropout_every_n_epochs": DataOption("int", _SHARED, "captions.dropout_every_n_epochs", 0),
    "caption_tag_dropout_rate": DataOption("number", _SHARED, "captions.tag_dropout", 0),
    "token_warmup_min": DataOption("int", _SHARED, "captions.tag_warmup.from", 1),
    "token_warmup_step": DataOption("number", _SHARED, "captions.tag_warmup.steps", 0),
    "caption_extension": DataOption("text", _SHARED, "captions.extension"),
    "class_tokens": DataOption("text", (GENERAL, DATASET, SUBSET), "captions.fallback"),
    "color_aug": DataOption("bool", _SHARED, "augment.color", False),
    "flip_aug": DataOption("bool", _SHARED, "augment.flip", False),
    "cache_info": DataOption("bool", (GENERAL, DATASET, SUBSET), "", False, "the index of images is always kept"),
    "custom_attributes": DataOption("table", (GENERAL, DATASET, SUBSET), "attributes"),
    "image_dir": DataOption("text", (SUBSET,), "path"),
    "is_reg": DataOption("bool", (SUBSET,), "role", False),
    "alpha_mask": DataOption("bool", (LINE, SUBSET), "mask", False),
    "metadata_file": DataOption("text", (SUBSET,), "captions.metadata.path"),
    "conditioning_data_dir": DataOption("text", (SUBSET,), "mask.path"),
}
SPELLINGS = {
    "train_batch_size": "batch_size",
    "dataset_repeats": "num_repeats",
    "caption_extention": "caption_extension",
}
PLACES = ("dataset_config", "train_data_dir", "reg_data_dir", "in_json")
"""Options of a command line that say where the data is."""
_DEFAULTS = {
    "enable_bucket": "buckets are off there unless enable_bucket is given",
    "max_bucket_reso": "the longest side of a bucket is 1024 there unless it is given, here twice the resolution",
    "caption_extension": "captions are .caption files there unless it is given",
    "class_tokens": "an image without caption is trained with an empty one there; take it out to be told about such"
    " images",
}
"""Why a default of that program is written out."""
_RESIZES = {"linear": "bilinear", "cubic": "bicubic"}
_FOLDER = re.compile(r"(\d+)_(.*)")


@dataclass(slots=True)
class Value:
    """What one option says, with the row that reports it."""

    value: Any
    row: Row


Level = dict[str, Value]


def is_data_option(name: str) -> bool:
    """Whether an option of a command line describes the data set."""
    return SPELLINGS.get(name, name) in OPTIONS


class DataImport:
    """Collects the levels of a data set and writes ``data.sets``. ``told``: source defaults get rows of their own."""

    def __init__(self, into: Translation, line: Sequence[Given], *, known: bool = True) -> None:
        self.into, self.known = into, known
        self.told: dict[str, Row] = {}
        self.line: Level = {}
        self.levels = [self.line]
        for each in line:
            name = SPELLINGS.get(each.name, each.name)
            if name in self.line:
                self.line[name].row.note = f"given again in {each.where}, which wins"
            self._read(self.line, each, LINE, name, typed=False)

    def document(self, document: Document) -> list[SetDraft]:
        """The sets of a data set file."""
        root = document.value
        if not isinstance(root, dict) or not isinstance(root.get("datasets"), list) or not root["datasets"]:
            raise UsageError("this is no data set file: it has no [[datasets]]", where=document.name)
        for key in root:
            if key not in ("general", "datasets"):
                self.into.add(Given(key, None, document.where((key,))), "unknown", "sd-scripts refuses it as well")
        general = self._level(document, ("general",), root.get("general") or {}, GENERAL)
        drafts: list[SetDraft] = []
        for number, entry in enumerate(root["datasets"]):
            place: JsonPath = ("datasets", number)
            subsets = (entry.get("subsets") or []) if isinstance(entry, dict) else None
            if not isinstance(subsets, list) or not all(isinstance(each, dict) for each in subsets):
                raise UsageError("a data set is a table with a list of subsets, which are tables",
                                 where=document.where(place))  # fmt: skip
            rest = {key: value for key, value in entry.items() if key != "subsets"}
            level = self._level(document, place, rest, DATASET)
            kinds = {"metadata_file" in each for each in subsets if "conditioning_data_dir" not in each}
            if not subsets or len(kinds) > 1:
                why = "it has no subsets" if not subsets else "subsets with and without metadata_file cannot be mixed"
                raise UsageError(f"datasets[{number}] cannot be used", where=document.where(place), why=why)
            levels = []
            for index, subset in enumerate(subsets):
                own = self._level(document, (*place, "subsets", index), subset, SUBSET)
                if "image_dir" not in own and "metadata_file" not in own:
                    raise UsageError(f"datasets[{number}].subsets[{index}] has no image_dir",
                                     where=document.where((*place, "subsets", index)),
                                     why="sd-scripts refuses it as well")  # fmt: skip
                levels.append([own, level, general, self.line])
            drafts += self._drafts(levels)
        return drafts

    def folders(self, places: Sequence[tuple[Given, Path, bool]]) -> list[SetDraft]:
        """The one set of ``train_data_dir`` and ``reg_data_dir``; a folder that is not there becomes one source."""
        levels: list[list[Level]] = []
        for given, folder, regularisation in places:
            row = self.into.add(given, "mapped", "its folders give repeats and class tokens")
            found = sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
            named = [(each, match) for each in found if (match := _FOLDER.fullmatch(each.name))]
            if not named:
                row.status = "missing"
                row.note = "no folder <repeats>_<class tokens> is there to read repeats and class tokens from"
            for each, match in named:
                level = {"image_dir": Value(f"{given_text(given)}/{each.name}", row),
                         "num_repeats": Value(int(match[1]), row), "class_tokens": Value(match[2], row)}  # fmt: skip
                levels.append([level | ({"is_reg": Value(True, row)} if regularisation else {}), self.line])
            if not named:
                reg = {"is_reg": Value(True, row)} if regularisation else {}
                levels.append([{"image_dir": Value(given_text(given), row)} | reg, self.line])
        return self._drafts(levels)

    def table(self, given: Given, folder: Given | None) -> list[SetDraft]:
        """The one set of ``in_json``."""
        level = {"metadata_file": Value(given_text(given), self.into.add(given, "mapped"))}
        if folder is not None:
            level["image_dir"] = Value(given_text(folder), self.into.add(folder, "mapped"))
        return self._drafts([[level, self.line]])

    def placeholder(self, given: Given | None) -> list[SetDraft]:
        """A source to fill in, for a file that is not there."""
        row = None
        if given is not None:
            note = "the file is not there: data.sets holds a source to fill in, or import the file on its own"
            row = self.into.add(given, "missing", note)
        source = Part()
        source.put("path", "images", row)
        self._captions(source, [self.line])
        return [SetDraft(1024, 1, [], [], Part(), [source])]

    # --- reading ------------------------------------------------------------------------------------------------------

    def _level(self, document: Document, place: JsonPath, entry: Mapping[str, Any], kind: str) -> Level:
        level: Level = {}
        if not isinstance(entry, Mapping):
            raise UsageError(f"{place[0]} is no table", where=document.where(place))
        for key, value in entry.items():
            shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in (*place, key))[1:]
            given = Given(key, value, document.where((*place, key)), shown)
            self._read(level, given, kind, SPELLINGS.get(key, key) if key == "caption_extention" else key, typed=True)
        self.levels.append(level)
        return level

    def tell_overridden(self) -> None:
        """Say of values that came to nothing that another level decides; once the sets are written."""
        for level in self.levels:
            for name, each in level.items():
                if not each.row.keys and not each.row.note and each.value not in (OPTIONS[name].off, False):
                    each.row.note = "every data set or subset says otherwise"

    def _read(self, level: Level, given: Given, kind: str, name: str, *, typed: bool) -> None:
        known = OPTIONS.get(name)
        if known is None or kind not in known.levels:
            allowed = [each for each, option in OPTIONS.items() if kind in option.levels]
            guess = nearest(name, [each for each in allowed if each != name])
            note = f"did you mean {guess}?" if guess and known is None else f"sd-scripts does not know it in a {kind}"
            self.into.add(given, "unknown", note)
            return
        try:
            value = _typed(known.kind, given.value) if typed else _from_text(known.kind, given.value)
        except (ValueError, TypeError) as error:
            self.into.add(given, "refused", str(error))
            return
        if value is None:
            self.into.add(given, "mapped", "not set")
            return
        level[name] = Value(value, self.into.add(given, "mapped", known.note))

    # --- translating --------------------------------------------------------------------------------------------------

    def _drafts(self, subsets: Sequence[list[Level]]) -> list[SetDraft]:
        """One set per geometry: crop and resampling belong to subsets there and to sets here."""
        drafts: list[SetDraft] = []
        for levels in subsets:
            repeats = look_up(levels, "num_repeats")
            if repeats is not None and repeats.value < 1:
                repeats.row.note = "below 1 the subset is left out, there too"
                continue
            self._validation(levels)
            geometry = self._geometry(levels)
            size, batch = look_up(levels, "resolution"), look_up(levels, "batch_size")
            draft = SetDraft(
                _square(size.value) if size else 1024,
                batch.value if batch else 1,
                [size.row] if size else [],
                [batch.row] if batch else [],
                geometry,
                [self._source(levels)],
            )
            same = next((d for d in drafts if d.geometry.value == geometry.value and d.size == draft.size), None)
            if same is None:
                drafts.append(draft)
            elif draft.sources[0].value["path"] not in [each.value["path"] for each in same.sources]:
                same.sources += draft.sources
                same.geometry.owners += geometry.owners
            else:
                _disown(draft.sources[0], "the same folder again in one data set is ignored, there too")
        return drafts

    def _validation(self, levels: list[Level]) -> None:
        """Held-out images are a share of everything here."""
        for name, key in (("validation_split", "validate.split"), ("validation_seed", "validate.seed")):
            found = look_up(levels, name)
            if found is not None and found.value != OPTIONS[name].off and not found.row.keys:
                found.row.keys += self.into.put(key, found.value)
                found.row.status = "changed" if name == "validation_split" else "mapped"

    def _geometry(self, levels: list[Level]) -> Part:
        part = Part()
        enabled = look_up(levels, "enable_bucket")
        limits = {name: look_up(levels, name) for name in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")}
        upscale = look_up(levels, "bucket_no_upscale")
        if enabled is None or not enabled.value:
            row = enabled.row if enabled else self._default("enable_bucket", False)
            if row is not None or enabled is not None:
                part.put("buckets.enabled", False, row)
            _no_use([*limits.values(), upscale], "without enable_bucket it does nothing there either")
        else:
            enabled.row.note = enabled.row.note or "buckets are on by default here"
            if upscale is not None and upscale.value:
                part.put("buckets.upscale", False, upscale.row)
                _no_use([limits["min_bucket_reso"], limits["max_bucket_reso"]], "bucket_no_upscale makes it unused")
            else:
                low, high = limits["min_bucket_reso"], limits["max_bucket_reso"]
                if low is not None:
                    part.put("buckets.min", low.value, low.row)
                row = high.row if high else self._default("max_bucket_reso", 1024)
                if row is not None:
                    part.put("buckets.max", high.value if high else 1024, row)
            if step := limits["bucket_reso_steps"]:
                part.put("buckets.step", step.value, step.row)
        if resize := look_up(levels, "resize_interpolation"):
            part.put("resize", _RESIZES.get(resize.value, resize.value), resize.row)
        if (crop := look_up(levels, "random_crop")) and crop.value:
            part.put("crop.style", "random", crop.row)
        if face := look_up(levels, "face_crop_aug_range"):
            part.put("crop.style", "face", face.row)
            part.put("crop.face_range", list(face.value), face.row)
        return part

    def _source(self, levels: list[Level]) -> Part:
        part = Part()
        folder, table = look_up(levels, "image_dir"), look_up(levels, "metadata_file")
        if folder is not None:
            part.put("path", folder.value, folder.row)
        elif table is not None:
            part.put("path", Path(table.value).parent.as_posix(), table.row)
        for name in ("num_repeats", "color_aug", "flip_aug", "network_multiplier"):
            found = look_up(levels, name)
            if found is not None and found.value != OPTIONS[name].off:
                part.put(OPTIONS[name].key, found.value, found.row)
        if (reg := look_up(levels, "is_reg")) and reg.value:
            part.put("role", "regularisation", reg.row)
        if (alpha := look_up(levels, "alpha_mask")) and alpha.value:
            part.put("mask", "alpha", alpha.row)
        if masks := look_up(levels, "conditioning_data_dir"):
            part.put("mask", {"path": masks.value}, masks.row)
        if free := look_up(levels, "custom_attributes"):
            preserve = free.value.get("diff_output_preservation")
            part.put("role" if preserve else "attributes", "preserve" if preserve else free.value, free.row)
        self._captions(part, levels)
        if table is not None:
            part.put("captions.from", "metadata", table.row)
            part.put("captions.metadata", {"path": table.value}, table.row)
        return part

    def _captions(self, part: Part, levels: list[Level]) -> None:
        part.put("captions.rule", "sd_scripts")
        for name, known in OPTIONS.items():
            found = look_up(levels, name)
            direct = known.key.startswith("captions.") and name not in _BY_CODE
            if direct and found is not None and found.value != known.off:
                part.put(known.key, found.value, found.row)
        if (wild := look_up(levels, "enable_wildcard")) and wild.value:
            part.put("captions.lines", "random", wild.row)
        warm, least = look_up(levels, "token_warmup_step"), look_up(levels, "token_warmup_min")
        if warm is not None and warm.value:
            part.put("captions.tag_warmup.steps", _steps(warm.value), warm.row)
            if least is not None:
                part.put("captions.tag_warmup.from", least.value, least.row)
        elif least is not None:
            _no_use([least], "without token_warmup_step it does nothing there either")
        extension = look_up(levels, "caption_extension")
        if look_up(levels, "metadata_file") is None:
            if extension is not None and extension.value == ".txt":
                extension.row.note = "the default here"
            elif extension is not None:
                part.put("captions.extension", extension.value, extension.row)
            elif row := self._default("caption_extension", ".caption"):
                part.put("captions.extension", ".caption", row)
        if look_up(levels, "class_tokens") is None and self.known:
            part.put("captions.on_missing", "empty", self._default("class_tokens", None))

    def _default(self, name: str, value: Any) -> Row | None:
        """One row for a default of the other program, however many sets and sources it counts for."""
        if not self.known:
            return None
        if name not in self.told:
            self.told[name] = self.into.add(Given(name, value, "default"), "default", _DEFAULTS[name])
        return self.told[name]


_BY_CODE = ("token_warmup_min", "token_warmup_step", "caption_extension", "metadata_file")


def look_up(levels: Sequence[Level], name: str) -> Value | None:
    """The value of the innermost level that has one."""
    return next((level[name] for level in levels if name in level), None)


def given_text(given: Given) -> str:
    """The first value as a path without a slash at its end."""
    value = given.value[0] if isinstance(given.value, list) and given.value else given.value
    return str(value).rstrip("/\\")


def _no_use(values: Sequence[Value | None], why: str) -> None:
    for each in values:
        if each is not None and not each.row.keys:
            each.row.note = why


def _disown(part: Part, why: str) -> None:
    for _, row in part.owners:
        if not row.keys:
            row.note = why


def _square(size: Any) -> Any:
    return size[0] if isinstance(size, list) and len(set(size)) == 1 else size


def _steps(value: float) -> int | str:
    return f"{value * 100:g}%" if value < 1 else int(value)


def _typed(kind: str, value: Any) -> Any:
    """A value of a file. Raises TypeError where sd-scripts refuses the type."""
    allowed: dict[str, tuple[type, ...]] = {
        "bool": (bool,), "int": (int,), "number": (int, float), "text": (str,),
        "pair": (list,), "size": (int, list), "table": (dict,),
    }  # fmt: skip
    if value is None:
        return None
    if not isinstance(value, allowed[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise TypeError(f"expected {kind}; sd-scripts refuses it too")
    return value


def _from_text(kind: str, value: Any) -> Any:
    """A value of a command line, or of a file of command-line options."""
    if isinstance(value, list) and len(value) < 2 and kind != "pair":
        value = value[0] if value else True
    if isinstance(value, list) and kind not in ("pair", "size"):
        raise ValueError("more than one value")
    if kind == "bool":
        return read_flag(value)
    if value is True or value is None:
        raise ValueError("a value is missing")
    if kind in ("pair", "size"):
        parts = value if isinstance(value, list) else str(value).split(",")
        numbers = [float(each) for each in parts]
        if kind == "pair":
            return numbers
        sizes = [int(each) for each in numbers]
        return sizes[0] if len(sizes) == 1 else sizes
    if kind == "int":
        return int(value)
    return float(value) if kind == "number" else str(value)
