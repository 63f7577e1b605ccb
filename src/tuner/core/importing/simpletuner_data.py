"""Data backends of bghira/SimpleTuner: a list of image sets, stores of encodings and conditioning sets."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner.core.config.foreign import Refused, Settings
from tuner.core.config.jsonc import Path as JsonPath
from tuner.core.config.messages import nearest
from tuner.core.data.geometry import nearest_multiple
from tuner.core.errors import UsageError
from tuner.core.importing.apply import Translation
from tuner.core.importing.report import Row
from tuner.core.importing.sets import Part
from tuner.core.importing.source import Document, Given, read_document

_STORE = "one store, found by content, holds everything encoded here: cache.dir"
_SCAN = "images are found by content and scanned at every start"
_REMOTE = "storage other than local folders"
_CONDITION = "conditioning images other than masks"

FIXED: Mapping[str, Settings | Refused | str] = {
    "id": "", "dataset_type": "", "type": "", "instance_data_dir": "", "resolution": "", "resolution_type": "",
    "crop": "", "crop_style": "", "crop_aspect": "", "crop_aspect_buckets": "", "minimum_image_size": "",
    "maximum_image_size": "", "target_downsample_size": "", "max_upscale_threshold": "", "minimum_aspect_ratio": "",
    "maximum_aspect_ratio": "", "repeats": "", "probability": "", "caption_strategy": "", "instance_prompt": "",
    "prepend_instance_prompt": "", "only_instance_prompt": "", "caption_shuffle": "", "caption_filter_list": "",
    "disable_multiline_split": "", "disabled": "", "disable": "", "max_num_samples": "", "is_regularisation_data": "",
    "is_regularization_data": "", "conditioning_data": "", "conditioning_type": "",
    "cache_dir_vae": Settings({}, _STORE),
    "cache_dir": "", "parquet": "", "batch_size": "", "aspect_bucket_rounding": "", "aspect_bucket_alignment": "",
    "text_embeds": Settings({}, _STORE), "image_embeds": Settings({}, _STORE), "default": Settings({}, _STORE),
    "vae_cache_clear_each_epoch": Refused("not_applicable", "a random crop is encoded at every visit here"),
    "write_batch_size": Settings({}, "encodings are written one by one"),
    "metadata_backend": Refused("not_applicable", _SCAN), "hash_filenames": Refused("not_applicable", _STORE),
    "skip_file_discovery": Refused("not_applicable", _SCAN),
    "preserve_data_backend_cache": Refused("not_applicable", _STORE), "scan_for_errors": Refused(
        "not_applicable", "images are checked when they are read; data.on_corrupt says what then"),
    "vae_cache_validation": Refused("not_applicable", _STORE),
    "dataset_name": Refused("not_built", _REMOTE), "huggingface": Refused("not_built", _REMOTE),
    "image_column": Refused("not_built", _REMOTE), "caption_column": Refused("not_built", _REMOTE),
    **{name: Refused("not_built", _REMOTE) for name in (
        "aws_bucket_name", "aws_data_prefix", "aws_endpoint_url", "aws_region_name", "csv_file", "csv_caption_column",
        "csv_url_column", "csv_cache_dir", "csv", "webshart", "huggingface_token", "split", "revision", "streaming")},
    "aws_access_key_id": Refused("not_applicable", "secrets are read from the environment"),
    "aws_secret_access_key": Refused("not_applicable", "secrets are read from the environment"),
    **{name: Refused("not_built", "sources that take part for a while") for name in (
        "start_epoch", "start_step", "end_epoch", "end_step")},
    "slider_strength": Refused("not_built", "slider training"),
    "timestep_sampling_offset": Refused("not_built", "timestep offset by source"),
    "source_dataset_id": Refused("not_built", _CONDITION), "conditioning": Refused("not_built", _CONDITION),
}  # fmt: skip
"""Keys of an entry. Text: code below says what becomes of it."""

STORES = ("text_embeds", "image_embeds", "conditioning_image_embeds", "distillation_cache")
_SPLITS = {"comma": ",", "space": " ", "period": "."}
_OFF: tuple[Any, ...] = (None, False, "", [], {})


class Entry:
    """One entry of the list: its values, and a row for each."""

    def __init__(self, into: Translation, document: Document, number: int, value: Mapping[str, Any]) -> None:
        self.values = {key.replace("-", "_"): each for key, each in value.items()}
        self.rows: dict[str, Row] = {}
        self.into, self.name = into, str(value.get("id") or f"source-{number + 1}")
        for key, each in value.items():
            name = key.replace("-", "_")
            given = Given(key, each, document.where((number, key)), f"[{self.name}] {key}")
            known = FIXED.get(name)
            if known is None:
                guess = nearest(name, FIXED)
                row = into.add(given, "unknown", f"did you mean {guess}?" if guess else "no such key of a data backend")
            elif isinstance(known, Refused) and each not in _OFF:
                row = into.add(given, known.status, known.why)
            else:
                row = into.add(given, "mapped", known.note if isinstance(known, Settings) else "")
            self.rows[name] = row

    @property
    def kind(self) -> str:
        return str(self.values.get("dataset_type") or "image")

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def note(self, name: str, text: str, status: Any = None) -> None:
        row = self.rows.get(name)
        if row is not None:
            row.note = text
            row.status = status or row.status

    def refuse(self, name: str, why: str) -> None:
        self.note(name, why, "not_built")


class Backends:
    """Translates a list of entries. ``run``: the options of the run, which some entries fall back to."""

    def __init__(self, into: Translation, document: Document, run: Mapping[str, Any], base: Path) -> None:
        if not isinstance(document.value, list):
            raise UsageError("a data backend file is a list of entries", where=document.name)
        for number, each in enumerate(document.value):
            if not isinstance(each, Mapping):
                raise UsageError("an entry of a data backend file is an object", where=document.where((number,)))
        self.into, self.run, self.base = into, run, base
        self.entries = [Entry(into, document, i, each) for i, each in enumerate(document.value)]
        self.dropout = self._dropout_row()
        self.told: dict[str, Row] = {}

    def write(self) -> None:
        """Put the sets into the configuration: one per geometry."""
        masks = {each.name: each for each in self.entries if each.get("conditioning_type") == "mask"}
        for mask in masks.values():
            self._unused(mask, "no image entry names it as its conditioning_data, so nothing uses it")
        groups: list[tuple[Part, list[Part]]] = []
        for entry in self.entries:
            if entry.kind in STORES:
                self._store(entry)
            elif entry.kind in ("image", "eval") and entry.name not in masks:
                geometry, source = self._geometry(entry), self._source(entry, masks)
                same = next((group for group in groups if group[0].value == geometry.value), None)
                if same is None:
                    groups.append((geometry, [source]))
                else:
                    same[0].owners += geometry.owners
                    same[1].append(source)
            elif entry.name not in masks:
                self._unused(entry, f"part of an entry of {entry.kind} data")
                entry.refuse("dataset_type", f"{entry.kind} data")
        if not groups:
            raise UsageError("no image data set is left", fix="name one with dataset_type image")
        sets = []
        for number, (geometry, sources) in enumerate(groups):
            place: JsonPath = ("data", "sets", number)
            sets.append(geometry.value | {"sources": [source.value for source in sources]})
            owned = [((*place, *path), row) for path, row in geometry.owners]
            for index, source in enumerate(sources):
                owned += [((*place, "sources", index, *path), row) for path, row in source.owners]
            for path, row in owned:
                if path not in row.keys:
                    row.keys.append(path)
        self.into.config["data"] = self.into.config.get("data", {}) | {"sets": sets}
        if len([source for _, sources in groups for source in sources]) > 1 and "data_backend_sampling" not in self.run:
            note = "sources are drawn by their size and probability there, not one after the other"
            self.into.add(Given("data_backend_sampling", "auto-weighting", "default"), "default", note,
                          {"data.sampling": "weighted"})  # fmt: skip
        moving = any(
            entry.get("crop", {}).get("style") == "random"
            and any(source.get("enabled", True) for source in entry["sources"])
            for entry in sets
        )
        if moving and not self.run.get("vae_cache_disable"):
            note = "a random crop is drawn at every visit here, so it is encoded then; center can be cached"
            self.into.add(Given("cache_latents", None, "default"), "default", note, {"cache.latents": "off"})

    def _dropout_row(self) -> Row | None:
        if "caption_dropout_probability" in self.run:
            return next((row for row in self.into.rows if row.name == "caption_dropout_probability"), None)
        note = "caption_dropout_probability is 0.1 there unless it is given, and 0 here"
        return self.into.add(Given("caption_dropout_probability", 0.1, "default"), "default", note)

    def _default(self, name: str, value: Any, note: str) -> Row:
        if name not in self.told:
            self.told[name] = self.into.add(Given(name, value, "default"), "default", note)
        return self.told[name]

    def _setting(self, entry: Entry, name: str, default: Any) -> tuple[Any, Row | None]:
        """A value of the entry, else of the run, else of the program."""
        if name in entry.values:
            return entry.values[name], entry.rows[name]
        if name in self.run:
            return self.run[name], next((row for row in self.into.rows if row.name == name), None)
        return default, None

    # --- geometry -----------------------------------------------------------------------------------------------------

    def _geometry(self, entry: Entry) -> Part:
        part = Part()
        kind, kind_row = self._setting(entry, "resolution_type", "pixel_area")
        step, step_row = self._setting(entry, "aspect_bucket_alignment", 64)
        resolution, row = self._setting(entry, "resolution", 1024)
        part.put("resolution", _edge(resolution, kind, int(step)), row)
        part.put("buckets.rule", "simpletuner", kind_row)
        if int(step) != 64:
            part.put("buckets.step", int(step), step_row)
        if kind == "pixel":
            part.put("resolution_mode", "short_edge", kind_row)
        elif kind == "area" and row is not None:
            row.status, row.note = "changed", "megapixels there, the edge of a square here"
        rounding, rounding_row = self._setting(entry, "aspect_bucket_rounding", 2)
        if rounding != 2:
            part.put("buckets.rounding", int(rounding), rounding_row)
        if entry.get("batch_size"):
            part.put("batch_size", int(entry.get("batch_size")), entry.rows["batch_size"])
        self._crop(entry, part, kind, int(step))
        if threshold := entry.get("max_upscale_threshold"):
            part.put("buckets.max_upscale", 1 + float(threshold), entry.rows["max_upscale_threshold"])
            entry.note("max_upscale_threshold", "a share there, a factor here", "changed")
        return part

    def _crop(self, entry: Entry, part: Part, kind: str, step: int) -> None:
        crops = bool(entry.get("crop"))
        entry.note("crop", "crop_style and crop_aspect say how" if crops else "the image's own shape")
        style = str(entry.get("crop_style") or "random")
        aspect = str(entry.get("crop_aspect") or "square") if crops else "preserve"
        styles = {"center": "center", "centre": "center", "corner": "corner", "random": "random"}
        if style not in styles:
            entry.refuse("crop_style", "crops around a detected face")
        elif styles[style] == "random" and not crops:
            entry.note(
                "crop_style", "without crop a few pixels at a random side there; evenly on both sides here", "changed"
            )
        elif styles[style] != "center":
            told = "crops are random there unless crop_style is given"
            chosen = entry.rows.get("crop_style")
            part.put("crop.style", styles[style], chosen or self._default("crop_style", "random", told))
        if aspect != "preserve":
            row = entry.rows.get("crop_aspect") or entry.rows.get("crop")
            part.put("crop.aspect", aspect, row)
        if (listed := entry.get("crop_aspect_buckets")) and aspect in ("closest", "random"):
            if all(isinstance(each, int | float) for each in listed):
                part.put("crop.aspect_list", [float(each) for each in listed], entry.rows["crop_aspect_buckets"])
            else:
                entry.refuse("crop_aspect_buckets", "ratios with weights: write a ratio several times")
        large, small = entry.get("maximum_image_size"), entry.get("target_downsample_size")
        if large and small:
            part.put("crop.shrink_above", _edge(large, kind, 1), entry.rows["maximum_image_size"])
            part.put("crop.shrink_to", _edge(small, kind, 1), entry.rows["target_downsample_size"])
        else:
            entry.note("maximum_image_size", "without target_downsample_size it does nothing there either")
            entry.note("target_downsample_size", "without maximum_image_size it does nothing there either")

    # --- sources ------------------------------------------------------------------------------------------------------

    def _source(self, entry: Entry, masks: Mapping[str, Entry]) -> Part:
        part = Part()
        part.put("id", entry.name, entry.rows.get("id"))
        part.put("path", self._folder(entry), entry.rows.get("instance_data_dir"))
        part.put("recursive", True, entry.rows.get("instance_data_dir"))
        if entry.get("repeats"):
            part.put("repeats", int(entry.get("repeats")) + 1, entry.rows["repeats"])
        entry.note("repeats", "further passes there, all passes here", "changed")
        if entry.get("probability", 1.0) != 1.0:
            part.put("weight", float(entry.get("probability")), entry.rows["probability"])
        if entry.get("disabled") or entry.get("disable"):
            part.put("enabled", False, entry.rows.get("disabled") or entry.rows.get("disable"))
        if entry.get("max_num_samples"):
            part.put("limit", int(entry.get("max_num_samples")), entry.rows["max_num_samples"])
        for name in ("is_regularisation_data", "is_regularization_data"):
            if entry.get(name):
                part.put("role", "preserve", entry.rows[name])
        if entry.kind == "eval":
            part.put("role", "validation", entry.rows["dataset_type"])
        for name, key in (("minimum_aspect_ratio", "min_aspect"), ("maximum_aspect_ratio", "max_aspect")):
            if entry.get(name):
                part.put(f"filters.{key}", float(entry.get(name)), entry.rows[name])
        kind, _ = self._setting(entry, "resolution_type", "pixel_area")
        smallest, row = self._setting(entry, "minimum_image_size", None)
        if smallest:
            part.put("filters.min_size", _edge(smallest, kind, 1), row)
        self._mask(entry, part, masks)
        self._captions(entry, part)
        return part

    def _folder(self, entry: Entry) -> str:
        storage = str(entry.get("type") or "local")
        if storage != "local":
            entry.refuse("type", f"{_REMOTE}: copy the images into the folder of the source")
            return f"images/{entry.name}"
        return str(entry.get("instance_data_dir") or f"images/{entry.name}")

    def _mask(self, entry: Entry, part: Part, masks: Mapping[str, Entry]) -> None:
        names = entry.get("conditioning_data")
        listed = [names] if isinstance(names, str) else list(names or [])
        listed += [each.name for each in masks.values() if each.get("source_dataset_id") == entry.name]
        for name in dict.fromkeys(listed):
            if name not in masks:
                entry.refuse("conditioning_data", _CONDITION)
                continue
            found = masks[name]
            for own, row in found.rows.items():
                known = own in ("id", "dataset_type", "conditioning_type", "source_dataset_id", "instance_data_dir")
                row.status = "mapped" if known else row.status
                row.note = f"masks of {entry.name}" if known else "masks follow the size and crop of their images"
            part.put("mask", {"path": str(found.get("instance_data_dir") or name)},
                     entry.rows.get("conditioning_data"), found.rows.get("instance_data_dir"))  # fmt: skip

    @staticmethod
    def _unused(entry: Entry, why: str) -> None:
        for row in entry.rows.values():
            row.status, row.note = "not_applicable", why

    def _captions(self, entry: Entry, part: Part) -> None:
        part.put("captions.rule", "simpletuner")
        strategy, row = self._setting(entry, "caption_strategy", "filename")
        prompt, prompt_row = self._setting(entry, "instance_prompt", None)
        prepend, prepend_row = self._setting(entry, "prepend_instance_prompt", False)
        only, only_row = self._setting(entry, "only_instance_prompt", False)
        if only or strategy in ("instanceprompt", "instance_prompt"):
            part.put("captions.from", "fixed", only_row if only else row)
            part.put("captions.fixed", str(prompt or ""), prompt_row)
        elif strategy == "textfile":
            joined, joined_row = self._setting(entry, "disable_multiline_split", False)
            part.put("captions.lines", "join" if joined else "random", joined_row or row)
        elif strategy == "filename":
            told = "captions are file names there unless caption_strategy is given"
            part.put("captions.from", "filename", row or self._default("caption_strategy", "filename", told))
        elif strategy == "parquet" and str((entry.get("parquet") or {}).get("path", "")).endswith((".json", ".jsonl")):
            self._table(entry, part)
        else:
            entry.refuse("caption_strategy", f"captions from {strategy}: write them beside the images as .txt")
            entry.refuse("parquet", "captions from parquet files: a .jsonl file of the same columns works")
            part.put("captions.lines", "random")
        if prepend and prompt and not only:
            part.put("captions.prefix", str(prompt), prompt_row, prepend_row)
        share = float(self.run.get("caption_dropout_probability", 0.1) or 0)
        if share:
            part.put("captions.dropout", share, self.dropout)
        self._shuffle(entry, part)
        self._filters(entry, part)

    def _table(self, entry: Entry, part: Part) -> None:
        block, row = entry.get("parquet"), entry.rows["parquet"]
        part.put("captions.from", "metadata", entry.rows.get("caption_strategy"))
        part.put("captions.metadata", {
            "path": block["path"], "caption_column": block.get("caption_column", "caption"), "tags_column": "",
            "filename_column": block.get("filename_column", "id")}, row)  # fmt: skip

    def _shuffle(self, entry: Entry, part: Part) -> None:
        block = entry.get("caption_shuffle")
        if not isinstance(block, Mapping) or not block.get("enable", True):
            return
        row = entry.rows["caption_shuffle"]
        seed = block.get("seed", self.run.get("seed", 0))
        variants = {"count": int(block.get("count", 1)), "seed": int(seed or 0),
                    "include_original": bool(block.get("include_original", True))}  # fmt: skip
        part.put("captions.variants", variants, row)
        separator = _SPLITS.get(str(block.get("split_on", "comma")), ",")
        if separator != ",":
            part.put("captions.separator", separator, row)
        if block.get("position_start"):
            part.put("captions.keep_first", int(block["position_start"]), row)

    def _filters(self, entry: Entry, part: Part) -> None:
        listed = entry.get("caption_filter_list")
        if isinstance(listed, str):
            path = Path(self.base, listed)
            if not path.is_file():
                entry.note("caption_filter_list", "the file is not there: its filters are not in the result", "missing")
                return
            listed = read_document(path).value if path.suffix == ".json" else path.read_text("utf-8").splitlines()
        if listed:
            entry.note(
                "caption_filter_list", "s/a/b/ works as it is documented, with or without the last slash", "changed"
            )
            part.put("captions.replace", replacements(listed), entry.rows["caption_filter_list"])

    def _store(self, entry: Entry) -> None:
        """A store of encodings: the first local one gives its folder to the one store here."""
        for name, row in entry.rows.items():
            if row.status == "mapped":
                row.note = _STORE
            if name == "cache_dir" and "dir" not in self.into.config.get("cache", {}) and entry.get("type") != "aws":
                row.keys += self.into.put("cache.dir", str(entry.get(name)))


def replacements(filters: Sequence[str]) -> list[dict[str, Any]]:
    """Filters in order: ``s/find/replace/`` by regular expression; else the text is removed, then what it matches."""
    made: list[dict[str, Any]] = []
    for text in filters:
        match = re.fullmatch(r"s/([^/]*)/([^/]*)/?", text)
        if match:
            made.append({"find": match[1], "with": match[2], "regex": True})
            continue
        made.append({"find": text})
        try:
            re.compile(text)
        except re.error:
            continue
        if re.escape(text).replace("\\ ", " ") != text:
            made.append({"find": text, "regex": True})
    return made


def _edge(value: Any, kind: str, step: int) -> int:
    """A size of that program as the edge or shorter side in pixels; sizes of areas are brought to the step."""
    edge = int(math.sqrt(1e6 * float(value))) if kind == "area" else int(value)
    return edge if kind == "pixel" or step == 1 else nearest_multiple(edge, step)
