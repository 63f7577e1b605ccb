"""Rules that span several keys: what a key needs, and keys that the rest of the configuration leaves without effect.

A value equal to its default is never "unused", so a resolved configuration passes the same checks again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from tuner.core.config.attention import attention_problems
from tuner.core.config.base import changed_keys
from tuner.core.config.data_checks import Problem, Unused, caption_problems, geometry_problems, validation_problems
from tuner.core.config.document import RawConfig, dotted
from tuner.core.config.jsonc import Path
from tuner.core.config.network import SPLITTING, kind_problems
from tuner.core.config.quantize import quantize_problems
from tuner.core.config.run import RunConfig
from tuner.core.config.speed import compile_problems
from tuner.core.errors import UsageError

_OF_PICTURES = (
    "every", "at_start", "negative", "seed", "count", "sampler", "cfg_rescale", "adapters", "adapter_strength"
)  # fmt: skip


def key_problems(config: RunConfig, raw: RawConfig) -> list[UsageError]:
    """Every problem that can be seen without knowing the model."""
    found = [*_data(config), *_cache(config), *_outputs(config), *_network(config), *_ema(config), *_extensions(config)]
    found.extend(_memory(config))
    found.extend(_optimizer(config))
    found.extend(_mode(config))
    found.extend(quantize_problems(config))
    found.extend(compile_problems(config))
    found.extend(attention_problems(config))
    return as_errors(found, raw)


def as_errors(found: Iterable[Problem], raw: RawConfig) -> list[UsageError]:
    """One error per place; an inherited value is reported where it was written, once.

    A default that some source or set uses is none that has no effect, so those are left out.
    """
    found = list(dict.fromkeys(found))
    heirs = Counter(raw.homes.values())
    unused = Counter(raw.homes.get(path) for path in {each.path for each in found if isinstance(each, Unused)})
    errors: dict[tuple[Path, str], UsageError] = {}
    for problem in found:
        path, what, fix = problem
        home = raw.homes.get(path, path)
        if isinstance(problem, Unused) and unused[home] < heirs[home]:
            continue
        error = UsageError(f"{dotted(home)}: {what}", where=raw.where(home), fix=fix)
        errors.setdefault((home, what), error)
    return list(errors.values())


def _data(config: RunConfig) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    data = config.data
    for number, entry in enumerate(data.sets):
        place: Path = ("data", "sets", number)
        yield from geometry_problems(entry, place)
        for index, source in enumerate(entry.sources):
            path: Path = (*place, "sources", index)
            if source.id in seen:
                yield (
                    (*path, "id"),
                    f"the id {source.id!r} is taken by {seen[source.id]}",
                    "give every source its own id",
                )
            seen.setdefault(source.id, dotted(path))
            yield from caption_problems(source.captions, (*path, "captions"))
            yield from validation_problems(source, path)
            if source.weight != 1 and data.sampling == "epoch":
                fix = "choose 'weighted', or use repeats"
                yield Unused((*path, "weight"), "has no effect with data.sampling 'epoch'", fix)
    if config.train.batch_size > 1 and not any(config.train.batch_size in (s.batch_size or ()) for s in data.sets):
        yield Unused(("train", "batch_size"), "has no effect: every set names its own batch_size")
    sources = [source for entry in data.sets for source in entry.sources if source.enabled]
    if not any(source.role == "train" for source in sources):
        yield ("data", "sets"), "no enabled source has the role 'train'", None
    if data.regularisation_weight != 1 and not any(source.role == "regularisation" for source in sources):
        yield ("data", "regularisation_weight"), "has no effect: no source has the role 'regularisation'", "take it out"
    masked = any(source.mask for source in sources)
    if not masked and config.loss.mask.enabled:
        yield ("loss", "mask", "enabled"), "no source has a mask", "give a source a mask, or take it out"
    for key in sorted(changed_keys(config.loss.mask) - {"enabled"}):
        if not masked or config.loss.mask.enabled is False:
            yield ("loss", "mask", key), "has no effect without masks", "give a source a mask, or take it out"
    held_out = config.validation.split > 0 or any(source.role == "validation" for source in sources)
    for key in sorted(changed_keys(config.validation) - {"seed", "split"}):
        if not held_out:
            yield ("validate", key), "has no effect: nothing is held out", "set validate.split, or a source's role"
    measured = {"validation", "train"} if config.validation.split > 0 else {"validation"}
    if not config.validation.pool and [source.role in measured for source in sources].count(True) == 1:
        yield ("validate", "pool"), "has no effect: images of one source are held out", "take it out"


def _cache(config: RunConfig) -> Iterator[Problem]:
    yield from _unused_cache_keys(config)
    if config.cache.latents == "off":
        return
    for number, entry in enumerate(config.data.sets):
        if entry.crop.style == "random" or (entry.crop.style == "face" and entry.crop.face_range is not None):
            path: Path = ("data", "sets", number, "crop", "style")
            yield path, "changes at every visit, so latents cannot be cached", 'set "cache": {"latents": "off"}'
        for index, source in enumerate(entry.sources):
            if source.enabled and source.augment.color and source.role != "validation":
                path = ("data", "sets", number, "sources", index, "augment", "color")
                yield path, "changes at every visit, so latents cannot be cached", 'set "cache": {"latents": "off"}'


def _unused_cache_keys(config: RunConfig) -> Iterator[Problem]:
    """Settings of encoding ahead where nothing is. Numbers of workers are limits, which zero work keeps as well."""
    cache = changed_keys(config.cache)
    no_latents, no_text = config.cache.latents == "off", config.cache.text == "off"
    for key, unused, why in (
        ("vae_batch_size", no_latents, "with cache.latents 'off'"),
        ("text_batch_size", no_text, "with cache.text 'off'"),
        ("max_text_variants", no_text, "with cache.text 'off'"),
        ("dtype", no_latents and no_text, "when nothing is cached"),
    ):
        if unused and key in cache:
            yield Unused(("cache", key), f"has no effect {why}")


def _network(config: RunConfig) -> Iterator[Problem]:
    network = config.network
    if network.rank == "from_file" and network.init_from is None:
        yield ("network", "rank"), "'from_file' needs network.init_from", None
    if network.rank == "from_file" and network.alpha is not None:
        yield ("network", "alpha"), "comes from the file as well with rank 'from_file'", "take it out"
    yield from kind_problems(network)
    if network.preset is not None and network.targets is not None:
        yield ("network", "preset"), "is replaced by network.targets", "keep one of the two"
    for number, rule in enumerate(network.rules):
        if changed_keys(rule) == {"match"}:
            yield ("network", "rules", number), "sets nothing but match", "give it a setting, such as rank or lr"
    yield from _start(config)
    for name in ("dropout", "rank_dropout", "module_dropout"):
        if getattr(network, name) == 1:
            yield ("network", name), "at 1 nothing would be trained", "choose a value below 1"


def _start(config: RunConfig) -> Iterator[Problem]:
    """What ``network.init`` does not go with."""
    network, path = config.network, ("network", "init")
    if network.init != "default" and network.init_from is not None:
        yield path, "has no effect: every value comes from network.init_from", "take one of the two out"
    if network.init not in SPLITTING:
        return
    if config.ema.enabled and config.ema.init_from is not None:
        why = f"{network.init!r} writes files of twice the rank, so no average can start from one"
        yield ("ema", "init_from"), why, "take it out"
    if network.max_norm is not None:
        why = f"network.init {network.init!r} starts far from zero: the norm of the factors is not that of the change"
        yield ("network", "max_norm"), why, "take one of the two out"
    if network.init == "loftq":
        for name in config.train.components:
            if name not in config.quantize.methods():
                why = f"'loftq' makes up for quantization, and {name} of train.components is not quantized"
                yield path, why, "set quantize, or choose 'pissa'"


def _outputs(config: RunConfig) -> Iterator[Problem]:
    sample = config.sample
    if sample.enabled and not sample.prompts:
        # The other keys are filled in from the model in a resolved configuration.
        for key in _OF_PICTURES:
            if key in changed_keys(sample):
                yield ("sample", key), "has no effect without sample.prompts", "add prompts"
    metadata = config.checkpoint.metadata
    for key in sorted(changed_keys(metadata) - {"embed"}):
        if not metadata.embed:
            yield ("checkpoint", "metadata", key), "has no effect while metadata.embed is off", "take one of both out"
    if config.log.dir is not None and not config.log.to:
        yield ("log", "dir"), "has no effect without trackers in log.to", 'add "to": ["tensorboard"]'
    yield from _trackers(config)
    start, steps = config.checkpoint.start_at, config.train.steps
    if start is not None and steps is not None and start >= steps:
        yield ("checkpoint", "start_at"), f"nothing is left to do: the run has {steps} steps", "raise train.steps"
    if config.checkpoint.keep_last is not None and config.checkpoint.every is None:
        yield ("checkpoint", "keep_last"), "has no effect without checkpoint.every", "set checkpoint.every"
    rolling = config.checkpoint.rolling
    if rolling is not None and rolling.every == config.checkpoint.every:
        fix = "make it more frequent, or take it out"
        yield ("checkpoint", "rolling"), "has no effect: checkpoint.every is due whenever this is", fix


def _trackers(config: RunConfig) -> Iterator[Problem]:
    """Keys that only some trackers read."""
    log = config.log
    readers = {"config": {"tensorboard", "wandb"}, "project": {"wandb"}, "run": {"wandb"}}
    for key, names in readers.items():
        if key in changed_keys(log) and not names & set(log.to):
            listed = " or ".join(sorted(names))
            yield ("log", key), f"has no effect without {listed} in log.to", "add it, or take this out"
    for name in log.args:
        if name != "wandb":
            yield ("log", "args", name), "has no effect: only 'wandb' takes arguments", "take it out"
        elif name not in log.to:
            yield ("log", "args", name), "has no effect without wandb in log.to", "add it, or take this out"


def _ema(config: RunConfig) -> Iterator[Problem]:
    users = (
        (("sample", "weights"), config.sample.weights),
        (("validate", "weights"), config.validation.weights),
    )
    if not config.ema.enabled:
        fix = "set ema.enabled, or take it out"
        for key in sorted(changed_keys(config.ema)):
            yield ("ema", key), "has no effect while ema.enabled is off", fix
        for path, which in users:
            if which != "train":
                yield path, f"{which!r} needs an average", fix
        if not config.checkpoint.save_ema:
            yield ("checkpoint", "save_ema"), "has no effect while ema.enabled is off", "take it out"
        return
    if not config.sample.prompts and config.sample.weights != "train":
        yield ("sample", "weights"), "has no effect without sample.prompts", "add prompts"
    steps = config.train.steps
    for key, earliest in (("start", config.ema.start + 1), ("every", config.ema.every)):
        if steps is not None and earliest > steps and key in changed_keys(config.ema):
            yield ("ema", key), f"nothing is ever averaged: the run has {steps} steps", "lower it"
    seen = any(which != "train" for _, which in users)
    if not (config.checkpoint.save_ema or config.ema.feedback or seen):
        fix = "set checkpoint.save_ema, or take ema out"
        yield ("ema", "enabled"), "has no effect: the average is neither saved nor looked at", fix


def _mode(config: RunConfig) -> Iterator[Problem]:
    """What belongs to adapters alone, and to whole models alone."""
    train = config.train
    for name in train.stop_component_at:
        if name not in train.components:
            yield ("train", "stop_component_at", name), "has no effect: it does not train", "add it to train.components"
    if len(train.stop_component_at) == len(train.components):
        yield ("train", "stop_component_at"), "nothing would train in the end", "leave a component out"
    if train.mode == "lora":
        if train.freeze:
            yield ("train", "freeze"), "has no effect on an adapter", "use network.exclude, or train.mode 'full'"
        for number, rule in enumerate(config.optimizer.lr_rules):
            if rule.group is not None:
                fix = "use match, or train.mode 'full'"
                yield ("optimizer", "lr_rules", number, "group"), "adapters have no such groups", fix
        return
    fix = "take it out, or train an adapter with train.mode 'lora'"
    for key in sorted(changed_keys(config.network)):
        yield Unused(("network", key), "has no effect with train.mode 'full'", fix)
    if config.precision.adapter != "fp32":
        yield Unused(("precision", "adapter"), "has no effect with train.mode 'full'", fix)
    if config.sample.adapter_strength != 1:
        yield Unused(("sample", "adapter_strength"), "has no effect with train.mode 'full'", fix)
    if config.checkpoint.format is not None and "format" in changed_keys(config.checkpoint):
        yield Unused(
            ("checkpoint", "format"), "has no effect: whole models keep the layout that they had", "take it out"
        )
    for number, entry in enumerate(config.data.sets):
        for index, source in enumerate(entry.sources):
            if source.enabled and source.role == "preserve":
                why = "'preserve' needs the base model, which is gone once train.mode 'full' moves its weights"
                yield ("data", "sets", number, "sources", index, "role"), why, "use 'regularisation', or an adapter"
    for name in config.quantize.methods():
        if name in train.components:
            path = ("quantize", "denoiser") if name == "denoiser" else ("quantize", "text_encoder", name)
            yield path, "quantized weights cannot train, as train.mode 'full' asks", "take it out, or train an adapter"


def _optimizer(config: RunConfig) -> Iterator[Problem]:
    optimizer, train = config.optimizer, config.train
    if optimizer.fuse != "off":
        if train.accumulate > 1:
            fix = "set train.accumulate to 1"
            yield ("optimizer", "fuse"), "every backward pass would be an update of its own", fix
        if train.clip_grad is not None and train.clip_grad.norm is not None:
            fix = 'set train.clip_grad to null, or to {"value": 1.0}'
            yield ("optimizer", "fuse"), "the norm of all gradients is known only after the updates", fix
    if config.precision.gradients != "weights" and train.accumulate == 1:
        fix = "set train.accumulate, or take it out"
        yield Unused(("precision", "gradients"), "has no effect without accumulation: nothing is added up", fix)
    sizes = {size for each in config.data.sets for size in each.batch_size or ()}
    if optimizer.lr_scale != "none" and sizes - {train.batch_size}:
        fix = "set train.batch_size, and no batch_size in data.sets"
        yield ("optimizer", "lr_scale"), "updates have several sizes, because sets name their own batch_size", fix
    if optimizer.lr_scale != "none" and train.batch_size * train.accumulate == 1:
        yield Unused(("optimizer", "lr_scale"), "has no effect: every update has one sample", "take it out")


def _memory(config: RunConfig) -> Iterator[Problem]:
    memory = config.memory
    if memory.checkpoint_every > 1 and memory.checkpointing == "off":
        fix = "set memory.checkpointing, or take it out"
        yield ("memory", "checkpoint_every"), "has no effect without memory.checkpointing", fix
    if memory.offload_activations != "off":
        if memory.checkpointing != "block":
            why = "needs memory.checkpointing 'block': it moves the inputs of blocks, and nothing else may be kept"
            yield ("memory", "offload_activations"), why, "set that"
        if memory.swap_blocks:
            why = "does not work with memory.swap_blocks: weights and activations would wait for each other on the bus"
            yield ("memory", "offload_activations"), why, "use one of the two"
    if memory.swap_blocks == 1:
        why = "at 1 frees nothing: the block would need as much room on the device as it leaves"
        yield ("memory", "swap_blocks"), why, "use 2 or more"


def _extensions(config: RunConfig) -> Iterator[Problem]:
    for number, name in enumerate(config.extensions):
        if name in config.extensions[:number]:
            yield ("extensions", number), f"{name!r} is listed twice", "take one of them out"
