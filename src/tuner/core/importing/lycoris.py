"""Adapters of LyCORIS: its names for kinds and settings, in command lines of sd-scripts and in files of SimpleTuner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.core.config.foreign import Convert, ForeignOption, Given, Kind, Refused, Settings, ignored, option

MODULE = "lycoris"
"""How names of its modules begin."""
_WHOLE = 10_000
"""A rank from which on nobody means a rank: it asks for whole matrices."""
_KINDS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "full": "full", "ia3": "ia3", "oft": "oft",
          "diag-oft": "oft", "boft": "boft"}  # fmt: skip
_CLASSES = (("Attention", r".*attn\d?\..*"), ("FeedForward", r".*\.(ff|ff_context|mlp)\..*"))
"""Ends of class names, and where modules of such a class are in the models here."""
_BY_NAME = "classes there, names of modules here: compare what trains"


def in_command_line(given: Given) -> bool:
    """Whether a command line of sd-scripts uses it."""
    return str(given.get("network_module", "")).startswith(MODULE)


def kind(algo: Any, *, decomposed: bool) -> str | Refused:
    """``network.type`` of an algorithm. decomposed: with the lengths of rows apart (DoRA)."""
    name = str(algo or "lora").lower()
    found = _KINDS.get(name)
    if found is None:
        return Refused("not_built", f"adapters of the kind {name}")
    if decomposed:
        return "dora" if found == "lora" else Refused("not_built", f"{found} with the lengths of rows apart")
    return found


def rank(algo: Any, value: int) -> Settings:
    """What the number of dimensions of an algorithm becomes."""
    found = _KINDS.get(str(algo or "lora").lower())
    if found in ("full", "ia3"):
        return Settings({}, "this kind has no rank")
    if found in ("oft", "boft"):
        return Settings({"network.block_size": value}, "the size of blocks there", changed=True)
    if found == "lokr" and value >= _WHOLE:
        return Settings({"network.full_matrix": True}, "a rank that asks for whole matrices")
    return Settings({"network.rank": value})


def alpha(algo: Any, dimensions: Any, value: float) -> Settings:
    found = _KINDS.get(str(algo or "lora").lower())
    if found not in ("lora", "loha", "lokr") or (found == "lokr" and int(dimensions or 0) >= _WHOLE):
        return Settings({}, "without a rank there is nothing to divide it by, there as here")
    return Settings({"network.alpha": value})


# --- sd-scripts -------------------------------------------------------------------------------------------------------


def _here(convert: Convert, *modules: str) -> Convert:
    """``convert``, for command lines that use LyCORIS, or one of these modules of sd-scripts."""

    def guarded(value: Any, given: Given) -> Settings | Refused:
        if not in_command_line(given) and given.get("network_module") not in modules:
            return Refused("not_applicable", "only the modules of LyCORIS read it")
        return convert(value, given)

    return guarded


def _to(key: str) -> Convert:
    return lambda value, given: Settings({key: value})


def _preset_name(value: Any, given: Given) -> Settings | Refused:
    if value in ("full", "full-lin"):
        return Settings({}, "every linear of the blocks, as here")
    ends = {"attn-only": _CLASSES[:1], "attn-mlp": _CLASSES}.get(str(value))
    if ends is None:
        return Refused("not_built", f"the modules of {value}: write network.targets")
    return Settings({"network.targets": [pattern for _, pattern in ends]}, _BY_NAME, changed=True)


_SETTINGS: tuple[tuple[str, str, Kind], ...] = (
    ("full_matrix", "network.full_matrix", "flag"),
    ("decompose_both", "network.decompose_both", "flag"),
    ("block_size", "network.block_size", "int"),
    ("constraint", "network.constraint", "float"),
    ("train_norm", "network.train_norms", "flag"),
)
_OTHERS = (
    *((name, "not_applicable", "trained blocks have no 3x3 convolutions") for name in (
        "use_tucker", "use_cp", "disable_conv_cp", "use_conv_cp")),
    ("bypass_mode", "not_applicable", "how a layer is computed is chosen here; the result is the same"),
    ("rs_lora", "not_built", "alpha divided by the root of the rank"),
    ("use_scalar", "not_built", "a trained factor on each module"),
    ("rescaled", "not_built", "rescaled rotations"),
    ("unbalanced_factorization", "not_built", "factors in the other order"),
    ("rank_dropout_scale", "not_built", "dropped rank components that scale the rest"),
)  # fmt: skip

COMMAND_LINE: tuple[ForeignOption, ...] = (
    option("network_args.algo", kind="text", convert=_here(lambda value, given: Settings({}, "part of network.type"))),
    option("network_args.dora_wd network_args.weight_decompose", kind="flag", off=(None, False),
           convert=_here(lambda value, given: Settings({}, "part of network.type"))),
    option("network_args.preset", kind="text", convert=_here(_preset_name)),
    option("network_args.dropout", kind="float", convert=_here(_to("network.dropout"))),
    option("network_args.factor", kind="int", convert=_here(_to("network.factor"), "networks.lokr")),
    *(option(f"network_args.{name}", kind=kind, convert=_here(_to(key))) for name, key, kind in _SETTINGS),
    *(option(f"network_args.{name}", kind="flag", off=(None, False), note=why, refused=status)
      for name, status, why in _OTHERS),
)  # fmt: skip
"""Rows of ``network_args``."""


# --- SimpleTuner ------------------------------------------------------------------------------------------------------


def _algo(value: Any, given: Given) -> Settings | Refused:
    found = kind(value, decomposed=bool(given.get("weight_decompose")))
    return found if isinstance(found, Refused) else Settings({"network.type": found})


def _multiplier(value: Any, given: Given) -> Settings | Refused:
    return Refused("not_applicable", "adapters train at strength 1 here")


def _preset(value: Any, given: Given) -> Settings | Refused:
    """Modules by class, and settings by class."""
    if not isinstance(value, Mapping):
        return Refused("not_built", "a choice of modules by name: write network.targets")
    targets, rules = [], []
    for key, entries in value.items():
        if key == "target_module":
            targets = [_pattern(name) for name in entries]
        elif key == "module_algo_map":
            rules = [_rule(name, settings, given) for name, settings in entries.items()]
        elif entries:
            return Refused("not_built", f"{key}: write network.targets and network.rules")
    refused = [each for each in (*targets, *rules) if isinstance(each, Refused)]
    if refused:
        return refused[0]
    kept = [rule for rule in rules if isinstance(rule, dict) and len(rule) > 1]
    keys = {"network.targets": targets} if targets else {}
    return Settings({**keys, **({"network.rules[]": kept} if kept else {})}, _BY_NAME, changed=True)


def _pattern(name: str) -> str | Refused:
    found = next((pattern for end, pattern in _CLASSES if str(name).endswith(end)), None)
    return found or Refused("not_built", f"the modules of class {name}: write network.targets and network.rules")


def _rule(name: str, settings: Mapping[str, Any], given: Given) -> dict[str, Any] | Refused:
    """A rule for the modules of a class; it only says what differs from the settings of all."""
    pattern = _pattern(name)
    if isinstance(pattern, Refused):
        return pattern
    names = {"factor": "factor", "linear_dim": "rank", "dim": "rank", "linear_alpha": "alpha", "alpha": "alpha"}
    rule: dict[str, Any] = {"match": pattern}
    for key, value in settings.items():
        if value == given.get(key):
            continue
        if key not in names:
            return Refused("not_built", f"{key} by class of modules")
        rule[names[key]] = value
    return rule


FILE: tuple[ForeignOption, ...] = (
    option("algo", kind="text", convert=_algo, default="lora"),
    option("linear_dim", kind="int", convert=lambda value, given: rank(given.get("algo"), value), default=4),
    option("linear_alpha", kind="float",
           convert=lambda value, given: alpha(given.get("algo"), given.get("linear_dim"), value), default=1.0),
    option("weight_decompose dora_wd", kind="flag", note="part of network.type", off=(None, False)),
    option("multiplier", kind="float", off=(None, 1.0), convert=_multiplier),
    option("dropout", "network.dropout", "float", off=(None, 0.0)),
    option("rank_dropout", "network.rank_dropout", "float", off=(None, 0.0)),
    option("module_dropout", "network.module_dropout", "float", off=(None, 0.0)),
    option("apply_preset", convert=_preset),
    option("factor", "network.factor", "int"),
    *(option(name, key, kind) for name, key, kind in _SETTINGS),
    *ignored("conv_dim conv_alpha", "trained blocks have no 3x3 convolutions"),
    *(option(name, kind="flag", off=(None, False), note=why, refused=status) for name, status, why in _OTHERS),
)  # fmt: skip
"""Keys of the file that ``lycoris_config`` of SimpleTuner names."""
