"""How options of other trainers are declared for ``tuner config import``.

Tables are plain data: the core has those that every model shares, a plugin those of its own model (the attribute that
``ModelPlugin.importers`` names: program to ``ForeignFamily`` entries). Keys are dotted keys of a configuration here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Given = Mapping[str, Any]
"""Every option of a source by its first name, read as its kind says; defaults of the other program are not in it."""

Kind = Literal["flag", "int", "float", "text", "list", "literal", "any"]


@dataclass(frozen=True, slots=True)
class Refused:
    """What a value becomes that cannot be taken over: ``not_built`` features, or ``not_applicable`` settings."""

    status: Literal["not_built", "not_applicable"]
    why: str


@dataclass(frozen=True, slots=True)
class Settings:
    """Several keys that one option sets; ``note`` replaces the option's own. An empty ``keys`` sets nothing."""

    keys: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    changed: bool = False


Convert = Callable[[Any, Given], "Settings | Refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignOption:
    """One option of another program.

    names: its spellings there, the first is shown; one that ends in ``.*`` takes every name that begins so.
    key: the key that takes the value; ending in ``[]`` it is added to a list. Empty: nothing is written, ``note`` says
    why. kind: how text is read. values: values that are called otherwise here, or refused. off: values that ask for
    nothing. convert: for what is more than a name, called with the value and all options of the source.
    changed: the value means something else here, ``note`` says what. refused: the option is never taken over, ``note``
    says why. needs: option and values of it without which this one does nothing in the other program either; no values
    stand for any. default: the value that the other program uses when the option is absent, where this one would do
    otherwise. default_with: the option without which that default does not matter.
    """

    names: tuple[str, ...]
    key: str = ""
    kind: Kind = "any"
    values: Mapping[Any, Any] = field(default_factory=dict)
    off: tuple[Any, ...] = (None,)
    convert: Convert | None = None
    note: str = ""
    changed: bool = False
    refused: Literal["", "not_built", "not_applicable"] = ""
    needs: tuple[str, tuple[Any, ...]] | None = None
    default: Any = None
    default_with: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignFamily:
    """What another program calls a model of this plugin.

    names: scripts, or values of the option that names the model. modules: adapter modules that only this model has.
    settings: keys that the choice sets. options: options of this model; they win over the shared ones of the same name.
    """

    names: tuple[str, ...]
    modules: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[ForeignOption, ...] = ()


Importers = Mapping[str, tuple[ForeignFamily, ...]]
"""Program (``sd-scripts``, ``simpletuner``) to the models of one plugin."""


def option(name: str, key: str = "", kind: Kind = "any", **rest: Any) -> ForeignOption:
    """A row of a table; ``name`` may hold several spellings, separated by blanks."""
    return ForeignOption(names=tuple(name.split()), key=key, kind=kind, **rest)


def ignored(names: str, note: str, kind: Kind = "any") -> tuple[ForeignOption, ...]:
    """Rows of options that have no counterpart, for one reason."""
    return tuple(option(name, kind=kind, refused="not_applicable", note=note) for name in names.split())


def unbuilt(
    names: str, note: str, kind: Kind = "any", off: tuple[Any, ...] = (None, False, "")
) -> tuple[ForeignOption, ...]:
    """Rows of options that ask for something that this program does not have."""
    return tuple(option(name, kind=kind, refused="not_built", note=note, off=off) for name in names.split())


# --- helpers for the tables of SimpleTuner ----------------------------------------------------------------------------


PREVIEWS = "script.previews"
"""Pseudo option of SimpleTuner: whether the run has prompts to draw."""


def repositories(by_flavour: Mapping[str, str], usual: str, note: str = "") -> tuple[ForeignOption, ForeignOption]:
    """Rows about where SimpleTuner takes the model from: without a path, from the repository of the flavour.

    by_flavour: its repositories. usual: the flavour when none is given; ``note`` says what else is to be known of it.
    """

    def path(value: Any, given: Given) -> Settings:
        if given.get("pretrained_model_name_or_path"):
            return Settings({"model.path": value})
        flavour = given.get("model_flavour") or usual
        why = "where that program takes the model from"
        found = {"model.path": by_flavour[flavour]} if flavour in by_flavour else {}
        return Settings(found, why if given.get("model_flavour") else note or why)

    def flavour(value: Any, given: Given) -> Settings | Refused:
        if value in by_flavour or given.get("pretrained_model_name_or_path"):
            return Settings({}, "it chooses the repository there; the kind of model is read from the weights here")
        return Refused("not_applicable", f"the repository of {value} is not known here: set model.path")

    return (
        option("pretrained_model_name_or_path", kind="text", convert=path, default=by_flavour[usual]),
        option("model_flavour", kind="text", convert=flavour, off=(None, "")),
    )


_BITS = {
    "int8-quanto": "int8", "int8-torchao": "int8", "int4-quanto": "int4", "int4-torchao": "int4", "fp8-quanto": "fp8",
    "fp8uz-quanto": "fp8", "fp8-torchao": "fp8", "nf4-bnb": "nf4",
}  # fmt: skip


def low_bits(names: str, key: str) -> ForeignOption:
    """Row of a way of storing frozen weights in SimpleTuner; the scales differ from program to program."""

    def convert(value: Any, given: Given) -> Settings | Refused:
        method = _BITS.get(str(value))
        if method is None:
            return Refused("not_built", f"{value} weights")
        return Settings({key: method}, "one scale per row (int8, fp8) or per 64 weights here", changed=True)

    return option(names, kind="text", convert=convert, off=(None, "no_change", ""))


def usual_preset(name: str, note: str) -> ForeignOption:
    """The modules that a standard LoRA adapts unless they are chosen. Adapters of LyCORIS choose in their own file."""

    def convert(value: Any, given: Given) -> Settings:
        return Settings() if given.get("peft_lora_target_modules") else Settings({"network.preset": value}, note)

    needs = ("lora_type", (None, "standard"))
    return option("peft_lora_preset", kind="text", convert=convert, default=name, needs=needs)


# --- helpers for the tables of sd-scripts -----------------------------------------------------------------------------


def rotates(given: Given) -> bool:
    """Whether the adapters of a script are rotations."""
    return "oft" in str(given.get("network_module") or "")


def trained_encoders(
    given: Given, clips: tuple[str, ...], t5: str | None = None, *, cached_rest: bool = False
) -> tuple[str, ...]:
    """Text encoders that a LoRA script of sd-scripts trains: all of ``clips`` unless it is told otherwise.

    cached_rest: the script leaves its encoder alone when encodings are cached.
    """
    cached = given.get("cache_text_encoder_outputs") or given.get("cache_text_encoder_outputs_to_disk")
    # Its module for rotations knows no text encoders.
    alone = given.get("network_train_unet_only") or str(given.get("network_module", "")).startswith("networks.oft")
    if alone or (cached_rest and cached):
        return ()
    return (*clips, *((t5,) if t5 and given.get("network_args.train_t5xxl") else ()))


def encoder_options(
    encoders: tuple[str, ...],
    clips: tuple[str, ...],
    t5: str | None = None,
    *,
    cached_rest: bool = False,
    parts: Mapping[str, str] = MappingProxyType({}),
    absent: Callable[[Given], tuple[str, ...]] = lambda given: (),
) -> tuple[ForeignOption, ...]:
    """Rows about which parts train, at which rates; ``encoders`` in the order of ``text_encoder_lr``.

    parts: further options that each make one more part of the model train, by name. absent: encoders that the model of
    these options does not have.
    """

    def trained(given: Given) -> tuple[str, ...]:
        found = trained_encoders(given, clips, t5, cached_rest=cached_rest)
        return tuple(name for name in found if name not in absent(given))

    def components(value: Any, given: Given) -> Settings:
        text = trained(given)
        others = tuple(part for name, part in parts.items() if given.get(name))
        if given.get("network_train_text_encoder_only") and text:
            return Settings({"train.components": list(text)}, "text encoders alone train")
        if not text and not others:
            return Settings({}, "the denoiser alone trains here unless train.components says otherwise")
        note = "text encoders train there unless they are switched off" if text else "trained beside the denoiser"
        return Settings({"train.components": ["denoiser", *others, *text]}, note)

    def rates(value: Any, given: Given) -> Settings | Refused:
        values = value if isinstance(value, list) else [value]
        if not values:
            return Settings({}, "empty: the base rate, as here")
        rate = {name: float(values[min(i, len(values) - 1)]) for i, name in enumerate(encoders)}
        kept = {f"optimizer.lr_by_component.{name}": rate[name] for name in trained(given)}
        if not kept:
            return Refused("not_applicable", "no text encoder trains")
        return Settings(kept)

    return (
        option("network_train_unet_only", kind="flag", convert=components, default=False),
        option("network_train_text_encoder_only", kind="flag", convert=components, off=(None, False)),
        option("text_encoder_lr", kind="list", convert=rates),
        *(option(name, kind="flag", convert=components, off=(None, False)) for name in parts),
        option("network_args.train_t5xxl", kind="flag", convert=components, off=(None, False))
        if t5
        else option("network_args.train_t5xxl", refused="not_applicable", note="this model has no T5 to train"),
    )


def preview_options(*, size: int, steps: int, cfg: float) -> tuple[ForeignOption, ...]:
    """Rows of what previews there take where a line of the prompt file says nothing."""

    def row(name: str, key: str, kind: Kind, value: Any) -> ForeignOption:
        note = f"of previews whose prompt does not say otherwise; {value} there"
        return option(f"sample_prompts.{name}", key, kind, default=value, default_with="sample_prompts", note=note)

    return (
        row("size", "sample.size", "int", size),
        row("steps", "sample.steps", "int", steps),
        row("scale", "sample.cfg", "float", cfg),
    )


def rank_rules(names: Mapping[str, str]) -> tuple[ForeignOption, ...]:
    """Rows for ranks by kind of layer: name in ``network_args`` to the name of the kind here."""

    def rule(kind: str) -> Convert:
        def convert(value: Any, given: Given) -> Settings:
            return Settings({"network.rules[]": {"match": kind, "rank": int(value)}})

        return convert

    return tuple(option(f"network_args.{name}", kind="int", convert=rule(kind)) for name, kind in names.items())


def outer_ranks(kinds: tuple[str, ...]) -> Convert:
    """Conversion of a list of ranks for layers outside of the blocks, in the order of ``kinds``; 0 leaves one out."""

    def convert(value: Any, given: Given) -> Settings | Refused:
        ranks = [int(each) for each in (value if isinstance(value, list | tuple) else [value])]
        if len(ranks) != len(kinds):
            return Refused("not_applicable", f"it needs {len(kinds)} numbers, and sd-scripts refuses others as well")
        chosen = [(kind, rank) for kind, rank in zip(kinds, ranks, strict=True) if rank > 0]
        if not chosen:
            return Settings({}, "all 0: none of them gets an adapter, as here")
        rules = [{"match": kind, "rank": rank} for kind, rank in chosen]
        return Settings({"network.include[]": [kind for kind, _ in chosen], "network.rules[]": rules})

    return convert


def block_choice(name: str, group: str) -> ForeignOption:
    """Row of ``all``, ``none`` or ``0,2,4-7`` for ``network.blocks.<group>``; here ``none`` is a value."""

    def convert(value: Any, given: Given) -> Settings:
        text = str(value).strip()
        if text == "all":
            return Settings({}, "all blocks, as here")
        if text == "none":
            return Settings({f"network.blocks.{group}": "none"})
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return Settings({f"network.blocks.{group}": [part if "-" in part else int(part) for part in parts]})

    return option(name, kind="text", convert=convert, off=())


def split_pairs(key: str, kind: type) -> Convert:
    """``pattern=value,...`` as network rules."""

    def convert(value: Any, given: Given) -> Settings | Refused:
        pairs = [part.strip().partition("=") for part in str(value).split(",") if part.strip()]
        try:
            rules = [{"match": match, key: kind(number)} for match, _, number in pairs]
        except ValueError:
            return Refused("not_applicable", "pairs have the form pattern=number, separated by commas")
        return Settings({"network.rules[]": rules})

    return convert


def patterns(key: str, note: str = "") -> Convert:
    def convert(value: Any, given: Given) -> Settings:
        made = literal(value) if isinstance(value, str) else value
        return Settings({key: list(made) if isinstance(made, list | tuple) else [str(made)]}, note)

    return convert


def literal(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
