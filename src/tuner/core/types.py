"""What passes between the stages of a run, and what a plugin declares about its model.

Letters in shapes: B batch, C latent channels, h and w latent size, H and W pixels, L tokens.
Importing this module costs nothing: torch is only named in annotations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from tuner.core.costs import CostRules
    from tuner.core.files import TensorInfo, WeightHeader

API_VERSION = (1, 0)
"""(major, minor) of the hook contract: a plugin runs when its major is equal and its minor is not newer."""


# --- what passes between hooks ----------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Models:
    """The loaded modules of a phase. ``denoiser`` keeps its identity for the whole run: every service acts in place."""

    denoiser: nn.Module | None = None
    vae: nn.Module | None = None
    text_encoders: dict[str, nn.Module] = field(default_factory=dict)
    tokenizers: dict[str, Any] = field(default_factory=dict)
    others: dict[str, nn.Module] = field(default_factory=dict)

    def component(self, name: str) -> nn.Module | None:
        """The module called ``name`` in ``ModelFacts.components``, or None when this phase did not load it."""
        if name == "denoiser":
            return self.denoiser
        if name == "vae":
            return self.vae
        return self.text_encoders.get(name) or self.others.get(name)

    def release(self, *names: str) -> None:
        """Forget components so that their memory can be freed."""
        for name in names:
            if name == "denoiser":
                self.denoiser = None
            elif name == "vae":
                self.vae = None
            else:
                self.text_encoders.pop(name, None)
                self.others.pop(name, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where and how ``load_models`` puts weights. ``dtypes`` maps a component to ``bfloat16`` or ``float32``."""

    device: str = "cpu"
    dtypes: Mapping[str, str] = field(default_factory=dict)

    def dtype(self, component: str) -> str:
        return self.dtypes.get(component, "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEmbeds:
    """Encoded captions: each tensor is [B, ...], named and shaped as ``ModelFacts.text_fields`` says."""

    tensors: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One sample of a batch. ``id`` is stable over runs; ``visit`` counts its repeats inside an epoch from 0."""

    id: str
    source: str
    caption: str
    visit: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What the loader yields.

    latents [B,C,h,w] float32, shifted and scaled for the denoiser; loss_mask [B,1,h,w] in 0..1 or None;
    loss_weight [B]; control: conditioning tensors by name, empty by default. ``text`` holds the cached fields only:
    fields of components that train are encoded in the step from ``items[i].caption``.
    """

    latents: Tensor
    text: TextEmbeds
    loss_mask: Tensor | None
    loss_weight: Tensor
    items: tuple[Item, ...]
    control: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseTarget:
    """noisy, target [B,C,h,w]; sigmas [B] float32 in 0..1; timesteps [B] in the denoiser's own unit; weight [B]."""

    noisy: Tensor
    target: Tensor
    sigmas: Tensor
    timesteps: Tensor
    weight: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamGroup:
    """Trainable parameters that share a learning rate.

    ``lr`` None means: the component's rate, else the base rate. ``role`` is ``up`` for matrices that
    a LoRA+ ratio speeds up.
    """

    name: str
    component: str
    params: dict[str, nn.Parameter]
    lr: float | None = None
    role: Literal["down", "up", "all"] = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The trainable part of a run. ``kind`` is the type of the adapter, ``weights`` for the model's own."""

    module: nn.Module
    param_groups: list[ParamGroup]
    kind: str


# --- what a plugin declares -------------------------------------------------------------------------------------------


Header = Mapping[str, "TensorInfo"]
"""Names of a weight file to dtype and shape, as read by ``tuner.core.files``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """An ``nn.ModuleList`` of identical blocks of the denoiser, in execution order.

    outside: full-match patterns on names of a block's parameters that the denoiser uses outside of the block's
    ``forward`` (modulations computed ahead for all blocks, say); they stay on the device when the block does not.
    axes: arguments of a block's ``forward`` with an axis that differs between calls: name (``name.key`` inside a
    dictionary) to the axis and what it counts, ``image`` tokens, rows of ``text``, or both as one sequence, ``joint``.
    A compiled block then has one graph for all sizes; without them, one per size.
    """

    path: str
    count: int
    outside: tuple[str, ...] = ()
    axes: Mapping[str, tuple[int, Literal["image", "text", "joint"]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One text tensor. ``shape`` leaves the batch axis out and may contain ``"L"``, the token axis.

    of: components the values come from; the field is cached when none of them trains.
    trim: name of the boolean field whose False rows are exactly ``pad``: such rows are not stored.
    floor: batches are padded with ``pad`` to at least this many tokens.
    parts: where a field joins several components side by side, the range [first, last) of the last axis of each.
    """

    shape: tuple[int | str, ...]
    dtype: str = "float32"
    of: tuple[str, ...] = ()
    trim: str | None = None
    floor: int | None = None
    pad: float = 0.0
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """Linears of one input that some files hold as one matrix.

    parent: full-match regular expression of the path in front of the members. members: their paths below it, in the
    order of the rows. rows: rows of each member in multiples of the input's width.
    """

    parent: str
    members: tuple[str, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRules:
    """Which modules an adapter touches by default: full-match regular expressions on module paths inside a component.

    include: what may be adapted at all. exclude: built-in exclusions, lifted by a user's include. presets: named
    alternatives for ``network.preset``: (include, exclude) pairs. groups: block groups for ``network.blocks``: name to
    the path prefix of a block list. fused: members of one group that are chosen with equal settings share one adapter,
    unless ``network.split_fused``; patterns match the single linears. kinds: names for patterns that a configuration
    may write instead of them, such as the attention of one side.
    """

    include: Mapping[str, tuple[str, ...]]
    exclude: tuple[str, ...] = ()
    presets: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[Fused, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where the values of one tensor of a weight file are in the loaded model.

    names: the parameters ``component:name`` whose rows it holds, one below the other. exchange: the two halves of its
    rows stand in the other order in the file. rows: how many rows each of ``names`` has for one of the others; empty:
    all have the same.
    """

    names: tuple[str, ...]
    exchange: bool = False
    rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A weight file (with its shards) that may be written again with trained values.

    name: what is added to the run's name, empty for the denoiser's file. header: all that the file holds, under its own
    names. tensors: those of its names that are parameters of components that may train.
    """

    name: str
    header: WeightHeader
    tensors: Mapping[str, StoredTensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMaps:
    """How the weight files of a model are laid out, for tools that have files but no run. No part may import torch.

    stored: (header, component) to the tensors of a file that are parameters, as in `StoredFile.tensors`. component
    None: the denoiser's file, with what an all-in-one file holds besides; a name: the file of that component. Empty for
    a file of something else.
    original, diffusers: from the parameters of the denoiser, ``component:name``, to the tensors that a file of that
    layout holds, under its names without prefix; a component that goes into the same file is among them.
    folders: component to the names of its folder in the diffusers layout, the first is the one to write.
    prefixes: component to what stands in front of its tensors in a single file; ``denoiser`` is always among them.
    alone: what stands there in a file that holds the denoiser alone.
    """

    stored: Callable[[WeightHeader, str | None], Mapping[str, StoredTensor]]
    original: Callable[[Collection[str]], Mapping[str, StoredTensor]]
    diffusers: Callable[[Collection[str]], Mapping[str, StoredTensor]]
    folders: Mapping[str, tuple[str, ...]]
    prefixes: Mapping[str, str]
    alone: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DtypeRules:
    """compute: dtypes the denoiser may run in, the first is the default; vae, text: defaults of those components."""

    compute: tuple[str, ...] = ("bfloat16", "float32")
    vae: str = "float32"
    text: str = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleDefaults:
    """Preview settings that mirror what the model's users render with.

    schedule: ``linear`` shifts evenly spaced levels from 1 to 0; ``table`` shifts evenly spaced levels down to the
    lowest of a shifted table of 1000, then ends at 0. shift: ``auto`` goes by the size of the picture. guidance: value
    of the embedded guidance, where the model has that input.
    """

    steps: int
    cfg: float
    shift: float | Literal["auto"]
    size: tuple[int, int]
    multiple: int
    schedule: Literal["linear", "table"] = "linear"
    guidance: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseDefaults:
    """Defaults of ``noise.timesteps``, ``noise.shift`` and ``noise.truncate`` for this model."""

    timesteps: str
    shift: float
    truncate: bool = False


COMFYUI_KINDS = ("lora", "dora", "loha", "lokr", "oft", "boft", "full", "norms")
"""What ComfyUI loads under the names of LyCORIS."""
LYCORIS_KINDS = (*COMFYUI_KINDS, "ia3")
JOINT_KINDS = ("lora", "dora", "full")
"""What can be stored for a joint matrix when its projections were trained apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFormat:
    """How one file format spells adapter tensors. A key is prefix + module path (renamed, joined) + suffix.

    prefixes: component to prefix; a component that is absent cannot be stored in this format.
    separator: ``"."``, or ``"_"`` for flattened names.
    down, up: suffixes of the two matrices. alpha: suffix of the scalar; None folds alpha/rank into ``up``.
    rename: component to (pattern, replacement) pairs applied in order to its module paths, full ``re.sub`` semantics.
    read_prefixes: further prefixes accepted when reading.
    fused: component to (group, module path of its joint matrix): the path is written as a replacement for the group's
    ``parent``. exchange: component to patterns of modules whose two halves of rows stand in the other order; they act
    only where there are twice as many rows as columns. kinds: kinds of adapters that the format's readers know, as in
    ``network.type``, and ``norms``; parts other than the two matrices are called the same everywhere. lengths: suffix
    of a DoRA's lengths. numbered: rotations are stored part by part of a joint matrix, with a number behind the suffix.
    readers: programs that load such files.
    """

    name: str
    prefixes: Mapping[str, str]
    separator: str = "."
    down: str
    up: str
    alpha: str | None = None
    kinds: tuple[str, ...] = ("lora", "dora")
    lengths: str = ".dora_scale"
    numbered: bool = False
    rename: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    read_prefixes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused: Mapping[str, tuple[tuple[Fused, str], ...]] = field(default_factory=dict)
    exchange: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    readers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMaps:
    """All adapter formats of a model.

    default: format written unless the config names another.
    paths: (keys of a file) to the adaptable module paths by component, deep enough for every index in those keys; this
    is what makes flattened names readable without guessing.
    """

    formats: tuple[KeyFormat, ...]
    default: str
    paths: Callable[[Collection[str]], Mapping[str, tuple[str, ...]]]

    def format(self, name: str) -> KeyFormat | None:
        return next((each for each in self.formats if each.name == name), None)


OUTER_LAYERS = (r"(\w*embed\w*|\w+_in|final\w*|norm_out|proj_out|text_projection|lm_head)(\..*)?",)
"""Modules directly in a component that make its input and output: few weights, and every error passes through them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Everything the core's services need to know about a model; sizes come from the weights.

    components: names that ``load_models``, ``train.components`` and ``optimizer.lr_by_component`` use.
    trainable: the components that may train. step_components: frozen components that every step still needs.
    max_tokens: token limit per tokenizer after configuration. files: files whose bytes make each component,
    an empty tuple for one that is code alone.
    posterior: how pixels are encoded unless ``latents.posterior`` says otherwise. loss_target: what is compared unless
    ``loss.target`` says otherwise. padding_masks: names that ``text_encoder.mask_padding`` may use. zero_padding:
    whether ``text_encoder.zero_padding`` is honoured. banded_latents: whether ``latents.chunk_size`` is. modules: paths
    of the linears of each component that may train, where the headers tell them; patterns are then checked before
    anything is loaded. modulation: full-match regular expressions on paths of linears inside the blocks that read one
    vector per sample, known before the first block; the denoiser's forward opens
    ``compute.modulation_cache.modulations`` around its blocks.
    stored: ``module:function`` of (RunConfig) to the `StoredFile`s of the model, for full fine-tuning; empty: it cannot
    be fully trained. groups: names for parameters that may have rates of their own in full fine-tuning, with full-match
    patterns on ``component:parameter``; the first that matches counts.
    no_quantize: full-match patterns on the paths of linears that stay as they are under ``quantize``. capabilities:
    what this model cannot do, and why: the text of the refusal. Names: a component (training it), ``full.`` with a
    component, or ``quantize.`` with a method. hides_keys: whether attention gets masks on a GPU, which some kernels
    cannot take. costs: what ``tuner plan`` calculates with; None: no plan for this model.
    """

    family: str
    flavour: str
    components: tuple[str, ...]
    trainable: tuple[str, ...]
    text_components: tuple[str, ...]
    step_components: tuple[str, ...] = ()
    latent_channels: int
    spatial_factor: int
    resolution_multiple: int
    block_lists: tuple[Blocks, ...]
    modulation: tuple[str, ...] = ()
    lora: LoraRules
    key_maps: str
    dtypes: DtypeRules
    text_fields: Mapping[str, Field]
    max_tokens: Mapping[str, int]
    files: Mapping[str, tuple[str, ...]]
    noise: NoiseDefaults
    sample: SampleDefaults
    guidance_input: bool = False
    posterior: Literal["mode", "sample"] = "mode"
    loss_target: Literal["velocity", "clean"] = "velocity"
    padding_masks: tuple[str, ...] = ()
    zero_padding: bool = False
    banded_latents: bool = False
    architecture: str = ""
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    no_quantize: tuple[str, ...] = OUTER_LAYERS
    stored: str = ""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    capabilities: Mapping[str, str] = field(default_factory=dict)
    hides_keys: bool = False
    costs: CostRules | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Marks a key of the ``model`` section that ``tuner configure`` asks for: ``Annotated[float, Ask(question=...)]``.

    question: in a user's words; of a dictionary each key is asked for, ``{name}`` stands for it. The help is the key's
    docstring, the answer's kind follows from the type: a choice for ``Literal``, yes or no, a number, a place of
    weights for ``ComponentSource``. when: ``missing`` asks only after the plugin's ``files`` or ``facts`` refused the
    section for the lack of this key. optional: keys of a dictionary that are offered although the model works without
    them. weights: the answer, a string, is a place of weights.
    """

    question: str
    when: Literal["always", "missing"] = "always"
    optional: tuple[str, ...] = ()
    weights: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlugin:
    """What an entry point of ``tuner.models`` points at. Every string is ``module:attribute``, imported when needed.

    config: pydantic model of the ``model`` section. files: (RunConfig) -> ComponentFiles, may download.
    detect: (Header) -> flavour or None. facts: (RunConfig, Header) -> ModelFacts. hooks: module with ``@hookimpl``
    functions; the only one that may import torch. presets: package with ``*.json``. key_maps: the KeyMaps, for tools
    that have adapter files but no run. count_tokens: (RunConfig) -> {tokenizer name: function of captions to token
    counts}; called by checks only, so it may import a tokenizer library. public: (RunConfig) -> ModelFacts of a
    published model, chosen by ``model.flavour``, with no file behind it: what ``tuner plan`` uses before a download.
    importers: the ``Importers`` of ``tuner.core.config.foreign``, what other trainers call the options of this model.
    weight_maps: the `WeightMaps`, for tools that have weight files but no run.
    recognise: (Header) -> keys of the ``model`` section that a file other than the denoiser's may be given for, such as
    ``vae`` or ``text_encoders.NAME``; () for any other file. It lets ``tuner configure`` find files by their content.
    """

    name: str
    api: tuple[int, int]
    config: str
    files: str
    detect: str
    facts: str
    hooks: str
    presets: str | None = None
    key_maps: str | None = None
    count_tokens: str | None = None
    public: str | None = None
    importers: str | None = None
    weight_maps: str | None = None
    recognise: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtensionPlugin:
    """What an entry point of ``tuner.extensions`` points at: wrappers on model hooks and run hooks."""

    name: str
    api: tuple[int, int]
    hooks: str


ComponentFiles = Mapping[str, "Sequence[Path]"]
