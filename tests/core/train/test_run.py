"""Whole runs on a tiny model: what they write, that they continue exactly, and that only the loss moves the weights."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tuner.core.config import load_config
from tuner.core.errors import UsageError
from tuner.core.plan.prepare import prepare
from tuner.core.track.events import read_events
from tuner.core.track.record import read_run
from tuner.core.train.check import check
from tuner.core.train.checkpoint import list_checkpoints
from tuner.core.train.folder import RunFolder
from tuner.core.train.run import cache_only, train


def losses(folder: Path) -> dict[int, float]:
    """Loss by step; a step that was done again after a resume counts once, as it ended."""
    return {event["step"]: event["loss"] for event in read_events(folder / "events.jsonl") if event["kind"] == "step"}


def adapter(folder: Path) -> bytes:
    [path] = folder.glob("*.safetensors")
    return path.read_bytes()


# --- what a run leaves behind -----------------------------------------------------------------------------------------


def test_a_run_leaves_an_adapter_and_its_whole_story(make_config, tmp_path):
    prompts = ["a red dog --w 64 --h 48 --s 2", "grass --w 64 --h 48 --s 2 --n dog --l 3"]
    config = make_config(
        sample__prompts=prompts, sample__every=4, checkpoint__every=3, validate={"split": 0.4, "every": 5}
    )
    summary = train(config)
    out = tmp_path / "out"
    assert (summary.reason, summary.steps, summary.files) == ("finished", 7, (out / "out.safetensors",))
    assert {path.name for path in list_checkpoints(RunFolder(out, "out"))} == {
        "step-000003", "step-000006", "step-000007",
    }  # fmt: skip
    assert (out / "checkpoints/step-000003/out-step00000003.safetensors").is_file()
    assert (out / "samples/step-000004/sheet.png").is_file()
    assert (out / "samples/step-000007/001.png").is_file()
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")
    assert json.loads((out / "config.resolved.json").read_text())["train"]["steps"] == 7
    assert json.loads((out / "manifest.json").read_text())["packages"]["torch"]
    ledger = json.loads((out / "data.json").read_text())
    assert sum(row["used"] for row in ledger["images"] if row["part"] == "train") > 0
    kinds = [event["kind"] for event in read_events(out / "events.jsonl")]
    assert kinds[0] == "run_start" and kinds[-1] == "run_end"
    assert kinds.count("step") == 7 and kinds.count("validation") == 2 and kinds.count("sample") == 2


def test_a_resolved_config_repeats_the_run(make_config, tmp_path):
    train(make_config())
    resolved = json.loads((tmp_path / "out/config.resolved.json").read_text())
    resolved["checkpoint"]["dir"] = str(tmp_path / "again")
    train(resolved)
    assert losses(tmp_path / "again") == losses(tmp_path / "out")


def test_no_path_and_no_user_name_leaves_the_machine(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("USER", "canary-user")
    monkeypatch.setenv("HF_TOKEN", "canary-token")
    train(make_config(checkpoint__metadata={"title": "Dogs", "comment": "hello"}))
    with safe_open(tmp_path / "out/out.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.title"] == "Dogs"
    text = json.dumps(metadata)
    assert str(tmp_path.parent) not in text and "canary" not in text
    report = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert str(tmp_path.parent) not in report and "canary" not in report


def test_metadata_can_be_left_out(make_config, tmp_path):
    train(make_config(checkpoint__metadata={"embed": False}))
    with safe_open(tmp_path / "out/out.safetensors", framework="pt") as file:
        assert not [key for key in file.metadata() or {} if key.startswith(("ss_", "modelspec"))]


# --- exact continuation -----------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "accumulated": {"train__accumulate": 2},
    "with dropout": {"network__dropout": 0.2, "network__rank_dropout": 0.2, "memory__checkpointing": "block"},
    "with random captions": {
        "data__sets__0__sources__0__captions": {"shuffle": True, "variants": 3, "dropout": 0.3},
        "data__sets__0__sources__0__augment": {"flip": True},
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_stopped_and_resumed_twice_equals_uninterrupted(make_config, tmp_path, changes):
    options = {"validate": {"split": 0.2, "every": 2}, **changes}
    train(make_config(checkpoint__dir=str(tmp_path / "whole/run"), **options))
    folder = tmp_path / "parts/run"
    for length in (2, 5, 7):
        # A constant curve would hide a wrong length, so the schedule is that of the whole run.
        config = make_config(checkpoint__dir=str(folder), **options)
        stop_after(config, length)
    assert adapter(folder) == adapter(tmp_path / "whole/run")
    assert losses(folder) == losses(tmp_path / "whole/run")


def stop_after(config: dict, steps: int) -> None:
    """Run with an extension that interrupts after an update, as Ctrl+C would, and save there."""
    folder = Path(config["checkpoint"]["dir"])

    def interrupt(original):
        def wrapped(self, step, metrics):
            original(self, step, metrics)
            if step == steps:
                signal.raise_signal(signal.SIGINT)

        return wrapped

    from tuner.core.registry.extensions import Extensions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Extensions, "on_step_end", interrupt(Extensions.on_step_end))
        train(config, resume="auto" if folder.exists() else None)


SCRIPT = """
import json, sys
from tuner.core.train.run import train
train(json.loads(sys.argv[1]), resume=sys.argv[2] if len(sys.argv) > 2 else None)
"""


def test_killed_anywhere_and_resumed_ends_with_the_same_bytes(make_config, tmp_path):
    options = {"checkpoint__every": 2, "train__steps": 40, "checkpoint__keep_last": 2}
    train(make_config(checkpoint__dir=str(tmp_path / "whole/run"), **options))
    folder = tmp_path / "killed/run"
    config = make_config(checkpoint__dir=str(folder), **options)
    for wanted in (5, 17):
        resume = ["auto"] if folder.exists() else []
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, json.dumps(config), *resume], stderr=subprocess.PIPE)
        with process:
            while process.poll() is None and max(losses_now(folder), default=0) < wanted:
                time.sleep(0.01)
            assert process.poll() is None, process.stderr.read().decode()
            os.kill(process.pid, signal.SIGKILL)
    reached = max(losses_now(folder))
    train(config, resume="auto")
    assert adapter(folder) == adapter(tmp_path / "whole/run")
    assert losses(folder) == losses(tmp_path / "whole/run")
    resumes = [event["step"] for event in read_events(folder / "events.jsonl") if event["kind"] == "resume"]
    assert len(resumes) == 2
    assert all(step % 2 == 0 for step in resumes) and resumes[-1] <= reached


def test_a_run_goes_on_from_its_rolling_checkpoint_and_keeps_the_lasting_ones(make_config, tmp_path):
    section = {"every": 4, "rolling": {"every": 1, "keep": 2}, "on_interrupt": "stop"}
    train(make_config(checkpoint={**section, "dir": str(tmp_path / "whole/run")}))
    config = make_config(checkpoint={**section, "dir": str(tmp_path / "parts/run")})
    stop_after(config, 6)
    folder = tmp_path / "parts/run"
    kept = [path.name for path in sorted((folder / "checkpoints").iterdir())]
    assert kept == ["step-000004", "step-000005", "step-000006"]
    train(config, resume="auto")
    kept = [path.name for path in sorted((folder / "checkpoints").iterdir())]
    assert kept == ["step-000004", "step-000005", "step-000006", "step-000007"]
    assert [event["step"] for event in read_events(folder / "events.jsonl") if event["kind"] == "resume"] == [6]
    assert adapter(folder) == adapter(tmp_path / "whole/run")


def losses_now(folder: Path) -> dict[int, float]:
    return losses(folder) if (folder / "events.jsonl").exists() else {}


def test_a_finished_run_can_be_made_longer(make_config, tmp_path):
    options = {"schedule__name": "constant"}
    train(make_config(checkpoint__dir=str(tmp_path / "whole/run"), train__steps=9, **options))
    folder = tmp_path / "longer/run"
    train(make_config(checkpoint__dir=str(folder), train__steps=4, **options))
    train(make_config(checkpoint__dir=str(folder), train__steps=9, **options), resume="auto")
    assert load_file(folder / "run.safetensors").keys() == load_file(tmp_path / "whole/run/run.safetensors").keys()
    assert losses(folder) == losses(tmp_path / "whole/run")


def test_a_finished_run_that_is_not_made_longer_says_so_and_stays_finished(make_config, tmp_path):
    folder = tmp_path / "run"
    train(make_config(checkpoint__dir=str(folder)))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for changes in ({}, {"train__steps": 5}):
        with pytest.raises(UsageError, match="already at step 7"):
            train(make_config(checkpoint__dir=str(folder), **changes), resume="auto")
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert read_run(folder).state() == "finished"


def test_resuming_with_another_configuration_is_refused_by_name(make_config):
    train(make_config(train__steps=2))
    with pytest.raises(UsageError) as error:
        train(make_config(optimizer__lr=5e-3), resume="auto")
    assert "optimizer.lr" in str(error.value)


def test_changed_data_begin_the_next_epoch_or_are_refused(make_config, tmp_path, pictures):
    own = tmp_path / "pictures"
    shutil.copytree(pictures, own)
    changes = {"data__sets__0__sources__0__path": str(own), "train__steps": 6, "checkpoint__every": 2}
    stop_after(make_config(**changes), 4)
    (own / "0.png").unlink()
    (own / "1.txt").write_text("a blue cat", encoding="utf-8")
    with pytest.raises(UsageError, match="the data changed") as error:
        train(make_config(**changes, checkpoint__strict_data=True), resume="auto")
    assert "0.png" in str(error.value)
    train(make_config(**changes), resume="auto")
    events = list(read_events(tmp_path / "out/events.jsonl"))
    [warning] = [event["message"] for event in events if event["kind"] == "warning"]
    assert "0.png" in warning and "next epoch" in warning
    steps = [event for event in events if event["kind"] == "step"]
    assert [event["epoch"] for event in steps] == [0, 0, 0, 0, 1, 1]
    assert steps[4]["loss_avg"] == steps[4]["loss"]


def test_a_checkpoint_of_another_folder_is_continued_with_its_own_settings_only(make_config, tmp_path):
    train(make_config(train__steps=2))
    checkpoint = str(tmp_path / "out/checkpoints/step-000002")
    branch = {"checkpoint__dir": str(tmp_path / "branch"), "train__steps": 4}
    with pytest.raises(UsageError, match=re.escape("optimizer.lr")):
        train(make_config(optimizer__lr=5e-3, **branch), resume=checkpoint)
    (tmp_path / "out/config.resolved.json").unlink()
    with pytest.raises(UsageError, match="made with seed 3"):
        train(make_config(train__seed=4, **branch), resume=checkpoint)


def test_a_checkpoint_can_be_continued_in_a_new_folder(make_config, tmp_path):
    train(make_config(checkpoint={"dir": str(tmp_path / "whole/run"), "every": 2, "state": "every"}, train__steps=4))
    checkpoint = str(tmp_path / "whole/run/checkpoints/step-000002")
    train(make_config(checkpoint__dir=str(tmp_path / "branch/run"), train__steps=4), resume=checkpoint)
    assert adapter(tmp_path / "branch/run") == adapter(tmp_path / "whole/run")
    assert list(losses(tmp_path / "branch/run")) == [3, 4]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_alone_go_on_at_a_step_as_the_run_that_went_there(make_config, tmp_path, accumulate):
    """With an optimizer that remembers nothing, the weights and the step are all there is."""
    options = {
        "optimizer": {"name": "sgd", "lr": 0.5}, "train__steps": 7, "train__accumulate": accumulate,
        "sample__prompts": ["a dog --w 64 --h 64 --s 1 --l 1"], "sample__at_start": True,
    }  # fmt: skip
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    train(make_config(checkpoint={"dir": str(whole), "every": 4}, **options))
    start = whole / "checkpoints/step-000004/whole-step00000004.safetensors"
    config = make_config(
        checkpoint={"dir": str(rest), "every": 2, "start_at": 4},
        network={"rank": 4, "init_from": str(start)},
        **options,
    )
    train(config)
    expected = {step: loss for step, loss in losses(whole).items() if step > 4}
    assert losses(rest) == pytest.approx(expected, rel=1e-5)
    rates = [[event["lr"] for event in read_events(folder / "events.jsonl") if event["kind"] == "step"]
             for folder in (whole, rest)]  # fmt: skip
    assert rates[1] == rates[0][4:]
    assert [path.name for path in sorted((rest / "checkpoints").iterdir())] == ["step-000006", "step-000007"]
    assert (rest / "samples/step-000004/000.png").is_file()


def test_a_start_after_the_end_is_refused(make_config):
    config = make_config(checkpoint__start_at=500, train={"epochs": 2})
    for command in (check, lambda config: prepare(load_config(config, env={})), train):
        with pytest.raises(UsageError, match="nothing is left to do: the run has 12 steps"):
            command(config)


def test_a_used_folder_is_not_overwritten(make_config, tmp_path):
    train(make_config(train__steps=2))
    before = adapter(tmp_path / "out")
    with pytest.raises(UsageError, match="--resume"):
        train(make_config(train__steps=3))
    assert adapter(tmp_path / "out") == before


# --- nothing but the loss moves the weights ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"sample__prompts": ["a dog --w 64 --h 64 --s 2"], "sample__every": 2, "sample__at_start": True},
        {"memory__checkpointing": "block"},
        {"cache__latents": "memory", "cache__text": "memory"},
        {"cache__latents": "off", "cache__dtype": "fp32"},
        {"cache__text": "off", "cache__dtype": "fp32"},
        {"data__workers": {"scan": 0, "cache": 2, "load": 3}},
        {"attention__split": True},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_services_leave_the_losses_as_they_are(make_config, tmp_path, changes):
    base = {"cache__dtype": changes.get("cache__dtype", "bf16")}
    train(make_config(checkpoint__dir=str(tmp_path / "plain"), **base))
    train(make_config(checkpoint__dir=str(tmp_path / "changed"), **changes))
    plain, changed = losses(tmp_path / "plain"), losses(tmp_path / "changed")
    # A live encoder sees captions in other batches than the cache did, so matrix products may round differently.
    exact = not {"attention__split", "cache__text", "cache__latents"} & set(changes)
    assert changed == (plain if exact else pytest.approx(plain, rel=2e-5))


def test_validation_leaves_the_training_as_it_is(make_config, tmp_path):
    for name, every in (("seldom", {"epochs": 100}), ("often", 1)):
        train(make_config(checkpoint__dir=str(tmp_path / name), validate={"split": 0.3, "every": every}))
    assert losses(tmp_path / "often") == losses(tmp_path / "seldom")


def test_held_out_images_may_be_measured_by_source(make_config, tmp_path, pictures):
    other = tmp_path / "cats"
    shutil.copytree(pictures, other)
    for path in other.glob("*.png"):
        with Image.open(path) as image:
            image.transpose(Image.Transpose.ROTATE_180).save(path)
    found = {}
    for pool in (True, False):
        validate = {"split": 0.4, "every": None, "pool": pool}
        config = make_config(checkpoint__dir=str(tmp_path / f"{pool}"), validate=validate, train__steps=3)
        config["data"]["sets"][0]["sources"].append({"id": "cats", "path": str(other), "role": "validation"})
        train(config)
        [found[pool]] = [e for e in read_events(tmp_path / f"{pool}/events.jsonl") if e["kind"] == "validation"]
    apart = found[False]["by_source"]
    assert found[True]["by_source"] == [] and found[True]["delta"] == found[False]["delta"]
    assert sorted(each["source"] for each in apart) == ["cats", "dogs"]
    assert sum(each["images"] for each in apart) == found[False]["images"]
    mean = sum(each["images"] * each["delta"] for each in apart) / found[False]["images"]
    assert mean == pytest.approx(found[False]["delta"])
    assert all(each["low"] <= each["delta"] <= each["high"] for each in apart)
    assert "<td>cats</td>" in (tmp_path / "False/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("changes", [{"train__accumulate": 3}, {"optimizer__fuse": "block", "train__clip_grad": None}])
def test_every_step_says_its_loss_by_source_and_by_noise_level(make_config, tmp_path, pictures, changes):
    config = make_config(train__steps=6, data__sets__0__batch_size=4, **changes)
    sets = config["data"]["sets"][0]
    sets |= {"resolution_mode": "fixed", "buckets": {"enabled": False}}
    sets["sources"].append({"id": "cats", "path": str(pictures)})
    train(config)
    steps = [event for event in read_events(tmp_path / "out/events.jsonl") if event["kind"] == "step"]
    assert {name for event in steps for name in event["by_source"]} == {"cats", "dogs"}
    assert {name for event in steps for name in event["by_timestep"]} <= {"0-250", "250-500", "500-750", "750-1000"}
    for event in steps:
        for parts in (event["by_source"], event["by_timestep"]):
            assert min(parts.values()) <= event["loss"] * 1.0001 and event["loss"] <= max(parts.values()) * 1.0001
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "Loss by source" in page and "Loss by timestep" in page


@pytest.mark.parametrize("stratified", [False, True])
def test_six_micro_batches_of_one_equal_one_of_six(make_config, tmp_path, stratified):
    for name, batch_size, accumulate in (("wide", 6, 1), ("narrow", 1, 6)):
        config = make_config(
            checkpoint__dir=str(tmp_path / name), train__accumulate=accumulate, train__epochs=4,
            noise__stratified=stratified,
        )  # fmt: skip
        del config["train"]["steps"]
        config["data"]["sets"][0] |= {
            "batch_size": batch_size, "resolution_mode": "fixed", "buckets": {"enabled": False},
        }  # fmt: skip
        config["data"]["sets"][0]["sources"][0]["repeats"] = 1
        train(config)
    wide, narrow = losses(tmp_path / "wide"), losses(tmp_path / "narrow")
    assert list(wide) == [1, 2, 3, 4]
    assert narrow == pytest.approx(wide, rel=1e-4)


def test_a_mask_of_zeros_gives_zero_loss_and_a_mask_of_ones_changes_nothing(make_config, tmp_path, pictures):
    for name, level in (("ones", 255), ("zeros", 0)):
        folder = tmp_path / name
        folder.mkdir()
        for picture in pictures.glob("*.png"):
            with Image.open(picture) as image:
                Image.new("L", image.size, level).save(folder / picture.name)
        train(
            make_config(
                checkpoint__dir=str(tmp_path / f"run-{name}"),
                data__sets__0__sources__0__mask={"path": str(folder)},
            )
        )
    train(make_config(checkpoint__dir=str(tmp_path / "run-none")))
    assert losses(tmp_path / "run-ones") == pytest.approx(losses(tmp_path / "run-none"), rel=1e-6)
    assert set(losses(tmp_path / "run-zeros").values()) == {0.0}


# --- caching as a stage of its own ------------------------------------------------------------------------------------


def test_caching_ahead_leaves_nothing_to_encode(make_config, tmp_path):
    config = make_config(cache__dir=str(tmp_path / "cache"))
    report = cache_only(config)
    assert report.batches_per_epoch > 0
    assert not (tmp_path / "out").exists()
    train(config)
    stages = [event for event in read_events(tmp_path / "out/events.jsonl") if event["kind"] == "stage"]
    assert [event["items"] for event in stages] == [0, 0, 0, 0]


def test_an_extension_that_wraps_the_encoder_has_entries_of_its_own(make_config, tmp_path, monkeypatch):
    site = tmp_path / "site"
    info = site / "tuner_louder-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tuner-louder\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tuner.extensions]\nlouder = tuner_louder:plugin\n")
    (site / "tuner_louder.py").write_text(
        "from tuner import ExtensionPlugin, TextEmbeds, hookimpl\n"
        "plugin = ExtensionPlugin(name='louder', api=(1, 0), hooks='tuner_louder')\n"
        "@hookimpl(wrapper=True)\n"
        "def encode_text():\n"
        "    embeds = yield\n"
        "    return TextEmbeds(tensors={**embeds.tensors, 'context': embeds.tensors['context'] * 2})\n"
    )
    monkeypatch.syspath_prepend(str(site))
    options = {"cache__dir": str(tmp_path / "cache"), "train__steps": 1}
    train(make_config(checkpoint__dir=str(tmp_path / "plain"), **options))
    train(make_config(checkpoint__dir=str(tmp_path / "louder"), extensions=["louder"], **options))
    stages = [event for event in read_events(tmp_path / "louder/events.jsonl") if event["kind"] == "stage"]
    assert {event["name"]: event["items"] > 0 for event in stages} == {"captions": True, "latents": False}
    assert losses(tmp_path / "louder") != losses(tmp_path / "plain")
