"""Pictures from a model with any number of adapters: a grid of prompts, strengths and seeds, without a training."""

from __future__ import annotations

import gc
import logging
import re
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tuner.core.adapters.checkpoints import read_weights
from tuner.core.adapters.merging import Addition
from tuner.core.adapters.stack import AdapterStack
from tuner.core.compute.attention_kernels import check_attention
from tuner.core.compute.dtypes import dtype_by_name
from tuner.core.config.train import MemoryConfig
from tuner.core.errors import UsageError
from tuner.core.registry import Run, open_run, without_training
from tuner.core.track.progress import Progress
from tuner.core.train.blocks import prepare_blocks
from tuner.core.train.compiling import check_compile, compiler, tokens_of
from tuner.core.train.device import empty_cache, pick_device
from tuner.core.train.folder import not_writable, require_writable
from tuner.core.train.merging import read_additions
from tuner.core.train.mounting import mount, read_fitting, told
from tuner.core.train.pictures import write_png, write_sheet
from tuner.core.train.prompts import Prompt, checked_seed, resolve_prompts
from tuner.core.train.quantizing import check_quantize, load_components, use_arithmetic
from tuner.core.train.run import set_torch
from tuner.core.train.sample_like import config_told, fingerprint
from tuner.core.train.sample_memory import blocks_to_stream, free_memory
from tuner.core.train.sample_texts import EncodedTexts, Stage, beside_denoiser
from tuner.core.train.sampling import draw_latents
from tuner.core.types import Models

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.core.config import RawConfig
    from tuner.core.train.sample_like import Like

log = logging.getLogger(__name__)

KEPT = 16
"""Latents that wait to be decoded together."""
SHEET = "sheet.png"
FOLDER = "samples"
FOLDER_NAME = "the folder for pictures"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to draw, besides the configuration.

    adapters: (file, strength), beside those of ``sample.adapters``. strengths: factors on the strengths of these
    adapters, one picture for each. seeds: one picture for each, instead of the seeds of the prompts. like: a picture
    to draw again, instead of ``sample.prompts``, with the adapters that it names besides ``adapters``. offered, known:
    files that these may be, of which all of ``offered`` must be among them. weights: file of a whole model that a run
    trained. arithmetic: whether quantized arithmetic has passed the run's check. out: a folder without pictures, made
    when it is not there; None: the next free number below ``samples``.
    """

    adapters: Sequence[tuple[Path, float]] = ()
    strengths: Sequence[float] = (1.0,)
    seeds: Sequence[int] | None = None
    like: Like | None = None
    offered: Sequence[Path] = ()
    known: Iterable[Path] = ()
    weights: Path | None = None
    arithmetic: bool | None = None
    out: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One picture of a grid. factor: of the strengths; strengths: of every adapter, as they act."""

    prompt: Prompt
    factor: float
    strengths: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Written files. ``sheet`` is None for a single picture. settings: those inside of each picture."""

    folder: Path
    images: tuple[Path, ...]
    settings: tuple[Mapping[str, Any], ...]
    sheet: Path | None
    seconds: float


def sample(raw: RawConfig, request: Request, *, console: Console | None = None) -> Drawn:
    """Draw every picture that is asked for. console: where progress is shown.

    raw: a configuration, of which the model section is enough. Raises UsageError before weights are read wherever that
    is possible.
    """
    started = time.monotonic()
    run = open_run(without_training(raw))
    additions, scaled = _read_adapters(run, request)
    cells = grid(_prompts(run, request), request, additions, scaled)
    device = pick_device()
    check_quantize(run.config, device)
    check_compile(run.config, device)
    check_attention(run.config, run.facts, device)
    stage = partial(Progress, plain=run.config.log.plain, console=console)
    artist = Artist(run, additions, request, device, stage)
    settings = tuple(artist.settings(cell) for cell in cells)
    images: list[Path] = []
    with _folder(request.out) as folder:
        set_torch(run.config)
        try:
            with compiler(run.config), closing(artist.draw(cells)) as drawn:
                for latents in drawn:
                    files = [folder / f"{number:03d}.png" for number in range(len(images), len(images) + len(latents))]
                    artist.write(files, latents, settings[len(images) :])
                    images += files
        except KeyboardInterrupt:
            if images:
                log.warning("%d of %d pictures are in %s", len(images), len(cells), folder)
            raise
        except torch.OutOfMemoryError as error:
            raise UsageError(
                "there is not enough memory to draw this",
                why=str(error).partition("\n")[0],
                fix="make smaller pictures (--size), or try --set quantize.denoiser=int8 or --set memory.swap_blocks=N",
            ) from error
        sheet = _sheet(folder / SHEET, cells, images) if len(images) > 1 else None
    seconds = time.monotonic() - started
    return Drawn(folder=folder, images=tuple(images), settings=settings, sheet=sheet, seconds=seconds)


# --- what to draw -----------------------------------------------------------------------------------------------------


def _read_adapters(run: Run, request: Request) -> tuple[list[Addition], int]:
    """Every adapter, and how many of the first are those that the strengths of a grid change."""
    read_additions(run.config, run.facts)
    wanted = list(request.adapters)
    if request.like is not None:
        further = (Path(each.path) for each in run.config.sample.adapters)
        wanted += request.like.adapters(request.offered, chain(further, request.known))
    found = [read_fitting(path, by, run.facts, where="--adapter") for path, by in wanted]
    scaled = len(found)
    if request.like is None:
        found += [
            read_fitting(Path(each.path), each.strength, run.facts, where=f"sample.adapters[{number}]")
            for number, each in enumerate(run.config.sample.adapters)
        ]
    if not scaled and tuple(request.strengths) != (1.0,):
        raise UsageError(
            "there is no adapter whose strength could change",
            where="--adapter-strengths",
            fix="add --adapter FILE, or leave the strengths out",
        )
    return found, scaled


def _prompts(run: Run, request: Request) -> list[Prompt]:
    if request.like is not None:
        request.like.check(run, _weights(run, request))
        return [request.like.prompt]
    section = run.config.sample
    if not section.prompts:
        raise UsageError("what should be drawn?", fix='add --prompt "TEXT", --prompts FILE, or sample.prompts')
    if request.seeds is not None:
        section = section.model_copy(update={"count": 1})
    return resolve_prompts(section, run.facts)


def _weights(run: Run, request: Request) -> list[Path]:
    return [request.weights] if request.weights is not None else [Path(each) for each in run.files["denoiser"]]


def grid(prompts: Sequence[Prompt], request: Request, additions: Sequence[Addition], scaled: int) -> list[Cell]:
    """Every prompt with every seed at every strength, in this order."""
    cells = []
    for prompt in prompts:
        for seed in dict.fromkeys(request.seeds if request.seeds is not None else (prompt.seed,)):
            for factor in dict.fromkeys(request.strengths):
                strengths = tuple(
                    each.strength * (factor if number < scaled else 1.0) for number, each in enumerate(additions)
                )
                seeded = replace(prompt, seed=checked_seed(seed, "--seed"))
                cells.append(Cell(prompt=seeded, factor=factor, strengths=strengths))
    return cells


@contextmanager
def _folder(wanted: Path | None) -> Iterator[Path]:
    """The folder to write into, which holds no pictures yet. What was made for nothing is taken away again."""
    made = True
    if wanted is None:
        wanted = _next_free(Path(FOLDER))
    elif wanted.is_dir() and any(wanted.glob("*.png")):
        raise UsageError(
            "there are pictures in this folder already",
            where=f"{wanted}, --out",
            fix="name another folder; without --out a new one is made",
        )
    else:
        made = not wanted.exists()
        require_writable(wanted, FOLDER_NAME, "--out")
    try:
        yield wanted
    finally:
        if made:
            # One with pictures in it stays.
            with suppress(OSError):
                wanted.rmdir()


def _next_free(base: Path) -> Path:
    """A new folder below ``base`` with the next number; two programs at once get two of them."""
    require_writable(base, FOLDER_NAME, "--out")
    number = max((int(each.name) for each in base.iterdir() if re.fullmatch(r"\d+", each.name)), default=0)
    while True:
        number += 1
        folder = base / f"{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise not_writable(FOLDER_NAME, folder, "--out", error) from error
        return folder


def _sheet(path: Path, cells: Sequence[Cell], images: Sequence[Path]) -> Path:
    """Strengths from left to right when there are several, else the seeds of each prompt."""
    by_strength = len({cell.factor for cell in cells}) > 1
    several = len({cell.prompt.seed for cell in cells}) > 1
    rows: dict[Prompt, list[tuple[Cell, Path]]] = {}
    for cell, image in zip(cells, images, strict=True):
        row = cell.prompt if by_strength else replace(cell.prompt, seed=0)
        rows.setdefault(row, []).append((cell, image))
    texts = [f"{row.text} (seed {row.seed})" if by_strength and several else row.text for row in rows]
    columns: list[tuple[str, list[Path | None]]] = []
    for place in range(max(map(len, rows.values()))):
        found = [row[place] if place < len(row) else None for row in rows.values()]
        titles = {
            f"strength {each[0].factor:g}" if by_strength else f"seed {each[0].prompt.seed}" for each in found if each
        }
        title = titles.pop() if len(titles) == 1 else ""
        columns.append((title, [None if each is None else each[1] for each in found]))
    write_sheet(path, texts, columns)
    return path


# --- drawing ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Artist:
    """Loads what each stage needs and lets it go: encoders, the denoiser, the image autoencoder."""

    run: Run
    additions: Sequence[Addition]
    request: Request
    device: torch.device
    stage: Stage
    adapters: list[dict[str, Any]] = field(init=False)
    model: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        files, facts = _weights(self.run, self.request), self.run.facts
        self.adapters = [told(each) for each in self.additions]
        self.model = {
            "family": facts.family,
            "flavour": facts.flavour,
            "file": files[0].name,
            "fingerprint": fingerprint(files),
        }

    def draw(self, cells: Sequence[Cell]) -> Generator[list[Tensor]]:
        """Latents of the cells in their order, so many at a time that they may wait for the autoencoder.

        When an interrupt or a lack of memory ends it, what is finished comes first.
        """
        texts = EncodedTexts(self.run, self.additions, self.device, self._prepare)
        texts.encode(
            (
                (texts.strengths(cell.strengths), text)
                for cell in cells
                for text in (cell.prompt.text, *([cell.prompt.negative] if cell.prompt.cfg > 1 else ()))
            ),
            self.stage,
        )
        if texts.loaded:
            # The encoders went with the calls that loaded them; their memory should too.
            gc.collect()
            empty_cache(self.device)
        run, models, stack = self._load([(cell.prompt.width, cell.prompt.height) for cell in cells])
        waiting: list[Tensor] = []
        try:
            with self.stage("drawing", sum(cell.prompt.steps for cell in cells), "steps") as progress:
                for number, cell in enumerate(cells, 1):
                    if len(waiting) == KEPT:
                        with progress.paused():
                            yield waiting
                        waiting = []
                    progress.fields["picture"] = f"{number}/{len(cells)}"
                    stack.set_strengths(cell.strengths)
                    key, prompt = texts.strengths(cell.strengths), cell.prompt
                    latents = draw_latents(
                        run.model,
                        models,
                        prompt,
                        texts.embeds(key, prompt.text),
                        texts.embeds(key, prompt.negative) if prompt.cfg > 1 else None,
                        device=self.device,
                        kernel=run.config.attention.sample_backend,
                        on_step=lambda _: progress.advance(),
                    )
                    waiting.append(latents)
        except (KeyboardInterrupt, torch.OutOfMemoryError):
            if waiting:
                log.warning("writing the %d finished pictures that wait for it", len(waiting))
                yield waiting
            raise
        yield waiting

    def _load(self, sizes: Sequence[tuple[int, int]]) -> tuple[Run, Models, AdapterStack]:
        """The denoiser with the adapters beside it, for pictures of these sizes (width, height)."""
        run = self._fitting(sizes)
        models = load_components(run, beside_denoiser(run.facts), self.device, self._prepare)
        if run.config.quantize.activations is not None and models.denoiser is not None:
            refused = self.request.arithmetic is False
            use_arithmetic(models.denoiser, "weights" if refused else run.config.quantize.activations)
        stack = mount(self.additions, models, run.config, run.facts)
        stack.attach()
        # Nothing is kept for a backward pass, so there is nothing to save on it.
        memory = MemoryConfig(swap_blocks=run.config.memory.swap_blocks)
        prepare_blocks(
            models,
            stack,
            run.config.model_copy(update={"memory": memory}),
            run.facts,
            self.device,
            tokens_of(sizes, run.facts),
        )
        return run, models, stack

    @torch.no_grad()
    def write(self, files: Sequence[Path], latents: Sequence[Tensor], settings: Sequence[Mapping[str, Any]]) -> None:
        """Decode latents and write the pictures with their settings."""
        models = load_components(self.run, ("vae",), self.device)
        with self.stage("decoding", len(latents), "pictures") as progress:
            for path, value, each in zip(files, latents, settings, strict=False):
                if path.exists():
                    raise UsageError(
                        "another program has written into this folder meanwhile",
                        where=str(path),
                        why="nothing is written over",
                        fix="name another folder (--out)",
                    )
                write_png(path, self.run.model.decode_latents(models, value.to(self.device))[0], dict(each))
                progress.advance()

    def settings(self, cell: Cell) -> dict[str, Any]:
        """What a picture says about its making: everything that repeating it needs, and no path."""
        config = self.run.config
        quantized = config.quantize.methods()
        return {
            "tuner": version("tuner"),
            "model": self.model,
            "adapters": [
                {**each, "strength": strength}
                for each, strength in zip(self.adapters, cell.strengths, strict=True)
                if strength
            ],
            **({"merged": self.run.manifest["merged"]} if "merged" in self.run.manifest else {}),
            **({"quantize": dict(quantized)} if quantized else {}),
            "config": config_told(config),
            **asdict(cell.prompt),
        }

    def _fitting(self, sizes: Sequence[tuple[int, int]]) -> Run:
        """The run with blocks streamed when the denoiser would not fit otherwise."""
        config = self.run.config
        values = sum(value.numel() for each in self.additions for value in each.tensors.values())
        size = values * dtype_by_name(config.precision.adapter, where="precision.adapter").itemsize
        count = blocks_to_stream(config, self.run.facts, sizes, free_memory(self.device), adapters=size)
        if count == config.memory.swap_blocks:
            return self.run
        memory = config.memory.model_copy(update={"swap_blocks": count})
        return replace(self.run, config=config.model_copy(update={"memory": memory}))

    @property
    def _prepare(self) -> Any:
        return None if self.request.weights is None else self._load_trained

    @torch.no_grad()
    def _load_trained(self, models: Models) -> None:
        """Put the weights of a fully trained model into what was loaded."""
        assert self.request.weights is not None
        config, facts = self.run.config, self.run.facts
        parameters = {
            f"{component}:{name}": value
            for component in config.train.components
            if (module := models.component(component)) is not None
            for name, value in module.named_parameters()
        }
        if not parameters:
            return
        shapes = {name: value.shape for name, value in parameters.items()}
        for name, value in read_weights(config, facts, self.request.weights, shapes):
            parameters[name].copy_(value)
