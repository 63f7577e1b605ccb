"""Every two services of a run together: they train and agree with what they must agree with, or are refused by name."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.core.train.refusals import REFUSALS
from tests.core.train.services import SERVICES, document, pairs
from tests.fixtures.runs import make_pictures, run_document
from tests.fixtures.tiny_anima import ADAPTER, DENOISER, ENCODER, make_tiny_anima
from tuner.core.config.document import merged
from tuner.core.errors import UsageError
from tuner.core.track.events import read_events
from tuner.core.train.run import train

STEPS = 2
TARGETS = [r"x_embedder\.proj\.1", r".*self_attn\.[qkv]_proj", r".*mlp\.layer1"]
NEAR, ROUGH = 2e-3, 1e-1
"""Relative differences of losses and gradient norms: other orders of summation, and those made visible by few bits."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """numbers: loss and gradient norm of every step. tensors: of the final file. leaves: files and kinds of events."""

    numbers: tuple[float, ...]
    tensors: Mapping[str, Tensor]
    folder: Path
    events: frozenset[str]

    def leaves(self, what: str) -> bool:
        return what in self.events or any(self.folder.glob(what))

    def equals(self, other: Outcome) -> bool:
        return (
            self.numbers == other.numbers
            and self.tensors.keys() == other.tensors.keys()
            and all(torch.equal(value, other.tensors[name]) for name, value in self.tensors.items())
        )


@dataclass
class Bench:
    """One tiny model, one cache; every run of it is made once."""

    base: dict[str, Any]
    folder: Path
    merged: Path
    pictures: Path
    outcomes: dict[str, Outcome | UsageError] = field(default_factory=dict)

    @staticmethod
    def make(folder: Path) -> Bench:
        sizes = replace(DENOISER, width=32, heads=1, blocks=4, mlp_width=64, text_width=16, adaln_rank=8)
        adapter = replace(ADAPTER, embed_width=16, width=16, source_width=16, out_width=16, layers=1, mlp_width=32)
        encoder = {**ENCODER, "width": 16, "layers": 1, "heads": 2, "key_heads": 1, "head_dim": 8, "mlp_width": 24}
        files = make_tiny_anima(folder / "model", denoiser=sizes, adapter=adapter, encoder=encoder)
        pictures = folder / "pictures"
        pictures.mkdir()
        make_pictures(pictures)
        base = run_document(
            {"family": "anima", **files},
            pictures,
            cache=folder / "cache",
            out=folder,
            steps=STEPS,
            precision={"compute": "fp32", "text_encoder": {"qwen3": "fp32", "llm_adapter": "fp32"}},
            network={"targets": TARGETS},
        )
        base["cache"]["dtype"] = "fp32"
        base["schedule"] = {"name": "constant"}
        base["checkpoint"]["state"] = "none"
        bench = Bench(base=base, folder=folder, merged=folder / "merged/merged.safetensors", pictures=pictures)
        train(merged(base, {"checkpoint": {"dir": str(bench.merged.parent)}, "optimizer": {"lr": 0.02}}))
        return bench

    def run(self, on: tuple[str, ...], also_needed: tuple[str, ...] = ()) -> Outcome:
        """The outcome of a run with these services; its refusal is raised."""
        wanted = document(self.base, on, also_needed)
        for entry in wanted["model"].get("merge", ()):
            entry["path"] = str(self.merged)
        if "compiled" in (*on, *also_needed):
            # One size of pictures: a graph for a range of sizes takes twice as long to make.
            self._only_square(wanted)
        roles = [role for name in on if (role := SERVICES[name].role)]
        if roles:
            [entry] = wanted["data"]["sets"]
            more = [{"id": role, "path": str(self.pictures), "role": role} for role in roles]
            wanted["data"] = {**wanted["data"], "sets": [{**entry, "sources": [*entry["sources"], *more]}]}
        key = json.dumps(wanted, sort_keys=True)
        if key not in self.outcomes:
            self.outcomes[key] = self._train(merged(wanted, {"checkpoint": {"dir": str(self._folder())}}))
        found = self.outcomes[key]
        if isinstance(found, UsageError):
            raise found
        return found

    def _only_square(self, wanted: dict[str, Any]) -> None:
        [entry] = wanted["data"]["sets"]
        wanted["data"] = {**wanted["data"], "sets": [{**entry, "buckets": {"enabled": False}}]}

    def _folder(self) -> Path:
        return self.folder / f"runs/{len(self.outcomes)}/run"

    def _train(self, wanted: dict[str, Any]) -> Outcome | UsageError:
        try:
            folder = train(wanted).folder
        except UsageError as error:
            return error
        events = list(read_events(folder / "events.jsonl"))
        steps = [each for each in events if each["kind"] == "step"]
        return Outcome(
            numbers=tuple(each[key] for each in steps for key in ("loss", "grad_norm")),
            tensors=load_file(folder / "run.safetensors"),
            folder=folder,
            events=frozenset(each["kind"] for each in events),
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Without waiting for the disk: more than a thousand runs write little and nothing that must outlive the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        made = Bench.make(tmp_path_factory.mktemp("matrix"))
        # What is there by now stays; looking through it again and again would take longer than the runs.
        gc.collect()
        gc.freeze()
        yield made
        gc.unfreeze()
        torch.compiler.reset()


def names(pair: tuple[str, str]) -> str:
    return " with ".join(pair)


TOGETHER = [pair for pair in pairs() if frozenset(pair) not in REFUSALS]
REFUSED = [pair for pair in pairs() if frozenset(pair) in REFUSALS]


@pytest.mark.parametrize("pair", sorted(TOGETHER, key=lambda pair: "compiled" in pair), ids=names)
def test_two_services_train_together(bench: Bench, pair: tuple[str, str]) -> None:
    both = bench.run(pair)
    assert len(both.numbers) == 2 * STEPS and all(0 < each < float("inf") for each in both.numbers)
    assert all(value.isfinite().all() for value in both.tensors.values())
    near = ROUGH if any(SERVICES[name].rough for name in pair) else NEAR
    for name, other in (pair, pair[::-1]):
        service = SERVICES[name]
        for what in service.leaves:
            assert both.leaves(what), f"{name} leaves no {what}"
        alone = bench.run((other,), (name,))
        if alone is both:
            continue  # the other service needs this one
        if service.effect == "other":
            assert not both.equals(alone), f"{name} has no effect beside {other}"
        elif service.effect == "same":
            assert both.equals(alone), f"{name} changes what {other} gives"
        else:
            assert both.numbers == pytest.approx(alone.numbers, rel=near), f"{name} changes what {other} gives"


@pytest.mark.parametrize("pair", REFUSED, ids=names)
def test_a_refusal_names_both_services_and_the_reason(bench: Bench, pair: tuple[str, str]) -> None:
    with pytest.raises(UsageError) as caught:
        bench.run(pair)
    message = str(caught.value)
    assert all(part in message for part in REFUSALS[frozenset(pair)])
    assert all(SERVICES[name].is_named_in(message) for name in pair), message


def test_every_refused_pair_is_one_of_two_services() -> None:
    assert {frozenset(pair) for pair in REFUSED} == set(REFUSALS)
