"""What users get wrong, and what machines do to them: each is told by name, nothing is lost, and the run can go on."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.core.data.pictures import picture
from tuner.core.adapters import streams as streams_module
from tuner.core.atomic import atomic_path
from tuner.core.data import cache as cache_module
from tuner.core.errors import UsageError
from tuner.core.registry.extensions import Extensions
from tuner.core.track.events import read_events
from tuner.core.train import step as step_module
from tuner.core.train import trainer as trainer_module
from tuner.core.train.check import check
from tuner.core.train.checkpoint import list_checkpoints, read_state
from tuner.core.train.folder import FolderLock, RunFolder
from tuner.core.train.run import cache_only, train

SOURCE = "data__sets__0__sources__0__"
WEIGHTS = {
    "denoiser": ("model__path", "anima.safetensors"),
    "vae": ("model__vae__path", "vae.safetensors"),
    "text encoder": ("model__text_encoders__qwen3__path", "qwen3/model.safetensors"),
}


def refusal(config: dict[str, Any], *parts: str) -> str:
    """What both the check and the run say about a configuration; the same, and before anything is encoded."""
    with pytest.raises(UsageError) as checked:
        check(config)
    with pytest.raises(UsageError) as run:
        train(config)
    assert not list_checkpoints(RunFolder(Path(config["checkpoint"]["dir"]), "out"))
    for part in parts:
        assert part in str(checked.value)
        assert part in str(run.value)
    return str(run.value)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """The log so far."""
    # A command line that ran in this process before keeps its messages to its own handlers.
    monkeypatch.setattr(logging.getLogger("tuner"), "propagate", True)
    return lambda: caplog.text


@pytest.fixture
def own_pictures(pictures: Path, tmp_path: Path) -> Path:
    """A copy of the pictures that a test may spoil."""
    return Path(shutil.copytree(pictures, tmp_path / "pictures"))


@pytest.fixture
def spoiled(model_files: dict[str, Any], tmp_path: Path) -> Callable[..., dict[str, str]]:
    """A function from a component and what is done to its file to the changed key of the configuration."""
    home = Path(model_files["path"]).parent

    def spoil(component: str, damage: Callable[[Path], object]) -> dict[str, str]:
        key, name = WEIGHTS[component]
        if component == "text encoder":
            # The tokenizer lies beside the weights.
            folder = Path(shutil.copytree(home / "qwen3", tmp_path / "qwen3"))
            damage(folder / "model.safetensors")
            return {key: str(folder)}
        shutil.copy(home / name, tmp_path / name)
        damage(tmp_path / name)
        return {key: str(tmp_path / name)}

    return spoil


def edited(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


# --- weight files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "model.path",
        "model.vae.path",
        "model.text_encoders.qwen3.path",
        "model.tokenizers.t5.path",
        "model.llm_adapter.path",
    ],
)
def test_a_wrong_path_is_told_with_its_key(make_config, tmp_path, key):
    path = str(tmp_path / "nothing" / "x.safetensors")
    refusal(make_config(**{key.replace(".", "__"): path}), "no such file or folder", f"{key}: {path}")


def test_a_misspelt_file_name_is_told_with_the_one_beside_it(make_config, model_files):
    path = model_files["path"]
    refusal(make_config(model__path=path.replace("anima.", "amina.")), f"did you mean {path}?")


DAMAGES = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "cut short"),
    "cut in the header": (lambda path: path.write_bytes(path.read_bytes()[:100]), "its header is incomplete"),
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><title>404</title>" * 9), "error page"),
    "a git-lfs pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "a renamed .pth": (lambda path: torch.save({"weight": torch.zeros(2)}, path), "PyTorch .pt/.pth archive"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("component", WEIGHTS)
def test_a_file_that_is_no_whole_safetensors_file_is_told(make_config, spoiled, component, damage):
    action, expected = DAMAGES[damage]
    changes = spoiled(component, action)
    [path] = changes.values()
    refusal(make_config(**changes), expected, f"at: {path}", "fix: ")


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"], "a Flux-like model"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "a Flux-like model"),
        (["single_transformer_blocks.0.attn.to_q.weight"], "a Flux-like model"),
        (["diffusion_model.blocks.0.self_attn.q_proj.lora_A.weight"], "an adapter (LoRA)"),
    ],
)
def test_weights_of_something_else_are_named(make_config, tmp_path, keys, kind):
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(2) for key in keys}, path)
    refusal(make_config(model__path=str(path)), "this is not an Anima model", str(path), f"it looks like {kind}")


def test_a_denoiser_given_as_vae_is_told_before_captions_are_encoded(make_config, model_files):
    refusal(make_config(model__vae__path=model_files["path"]), "this is not a Qwen-Image VAE", "set model.vae.path")


@pytest.mark.parametrize(
    ("component", "lost"),
    [
        ("denoiser", "net.blocks.1.mlp.layer2.weight"),
        ("denoiser", "net.llm_adapter.blocks.1.mlp.0.weight"),
        ("vae", "decoder.middle.0.residual.2.weight"),
        ("vae", "encoder.downsamples.3.residual.2.weight"),
        ("text encoder", "model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_missing_and_an_unknown_tensor_are_named(make_config, spoiled, component, lost):
    added = lost.removesuffix("weight") + "extra"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[added] = tensors.pop(lost)

    changes = spoiled(component, edited(change))
    for prefix in ("net.", "model."):
        lost, added = lost.removeprefix(prefix), added.removeprefix(prefix)
    refusal(make_config(**changes), "the weights do not fit the model", f"missing: {lost}", f"unknown: {added}")


# --- pictures and captions --------------------------------------------------------------------------------------------


def spoil_pictures(folder: Path) -> bytes:
    """One file that is no picture, and one whose header is sound while its pixels are gone."""
    (folder / "1.png").write_bytes(b"no picture")
    hollow = picture(folder / "hollow.webp", 300, 200, caption="hollow")
    data = hollow.read_bytes()[:100] + bytes(hollow.stat().st_size - 100)
    hollow.write_bytes(data)
    return data


def test_corrupt_pictures_among_good_ones_stop_the_run_by_name(make_config, own_pictures, tmp_path):
    spoil_pictures(own_pictures)
    config = make_config(**{f"{SOURCE}path": str(own_pictures)})
    with pytest.raises(UsageError, match=r"dogs/1\.png(.|\n)*data\.on_corrupt"):
        train(config)
    with pytest.raises(UsageError) as caught:
        check(config)
    assert "dogs/1.png" in str(caught.value)
    (own_pictures / "1.png").unlink()
    # Only decoding shows the other one.
    with pytest.raises(UsageError, match=r"hollow\.webp(.|\n)*data\.on_corrupt"):
        check(config)
    with pytest.raises(UsageError, match=r"hollow\.webp(.|\n)*data\.on_corrupt"):
        train(config)
    (own_pictures / "hollow.webp").unlink()
    assert train(config).reason == "finished"


def test_corrupt_pictures_are_skipped_and_listed_where_the_configuration_says_so(
    make_config, own_pictures, tmp_path, messages
):
    data = spoil_pictures(own_pictures)
    config = make_config(**{f"{SOURCE}path": str(own_pictures), "data__on_corrupt": "skip"})
    left_out = check(config).plan.left_out
    assert sorted(image for images in left_out.values() for image in images) == ["dogs/1.png", "dogs/hollow.webp"]
    assert train(config).reason == "finished"
    assert "1 left out: the content is no image format that can be read (dogs/1.png)" in messages()
    assert "(dogs/hollow.webp)" in messages()
    ledger = json.loads((tmp_path / "out" / "data.json").read_text())
    assert [row["image"] for row in ledger["left_out"]] == ["1.png", "hollow.webp"]
    assert len(ledger["images"]) == 5
    assert (own_pictures / "hollow.webp").read_bytes() == data


@pytest.mark.parametrize("on_missing", ["error", "empty", "skip"])
def test_a_missing_caption_is_an_error_or_what_the_configuration_says(make_config, own_pictures, tmp_path, on_missing):
    (own_pictures / "1.txt").unlink()
    config = make_config(
        **{f"{SOURCE}path": str(own_pictures), f"{SOURCE}captions": {"on_missing": on_missing}, "train__steps": 2}
    )
    if on_missing == "error":
        refusal(config, "an image has no caption", "dogs/1.png", "there is no 1.txt beside it", "captions.fallback")
        return
    train(config)
    ledger = json.loads((tmp_path / "out" / "data.json").read_text())
    assert [row["reason"] for row in ledger["left_out"]] == (["no caption"] if on_missing == "skip" else [])


def test_folders_without_pictures_are_told(make_config, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    refusal(make_config(**{f"{SOURCE}path": str(tmp_path / "empty")}), "has no images", 'source "dogs"')
    refusal(make_config(**{f"{SOURCE}path": str(tmp_path / "no")}), f"the folder {tmp_path / 'no'} does not exist")
    refusal(make_config(**{f"{SOURCE}path": str(tmp_path / "file")}), "is not a folder")


def test_captions_over_the_token_limit_are_counted_once_and_never_cut_silently(make_config, own_pictures, messages):
    (own_pictures / "0.txt").write_text("red dog " * 40)
    (own_pictures / "1.txt").write_text("blue dog " * 40)
    config = make_config(
        **{f"{SOURCE}path": str(own_pictures), "cache__text": "memory"},
        text_encoder={"max_tokens": {"qwen3": 64, "t5": 128}},
        train__steps=2,
    )
    warnings = " ".join(check(config).warnings)
    assert "more than 64 qwen3 tokens are cut, here 2" in warnings
    train(config)
    counted = [line for line in messages().splitlines() if "exceed 64 Qwen3 tokens" in line]
    assert len(counted) == 1


# --- numbers that cannot work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data__sets__0__resolution": 100}, "data.sets[0].resolution: 100 is not a multiple of 16"),
        ({"data__sets__0__buckets": {"step": 20}}, "data.sets[0].buckets.step: 20 is not a multiple of 16"),
        ({"network__rank": 0}, "the rank is 0"),
        ({"network__include": [r"blocks\.77\..*"]}, "matches no module"),
        ({"network__rules": [{"match": "blocks.0.mlp.layr1", "rank": 2}]}, "close names: blocks.0.mlp.layer1"),
        ({"network__init_from": "nothing.safetensors"}, "no such file"),
        ({"sample__prompts": "nothing.txt"}, "cannot read the prompt file"),
        ({"train__components": ["denoisr"]}, "'denoisr' cannot train"),
        ({"optimizer__name": "adamww"}, "did you mean 'adamw'?"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_told_before_anything_is_encoded(make_config, tmp_path, changes, expected):
    refusal(make_config(cache__dir=str(tmp_path / "cache"), **changes), expected)
    assert not list(tmp_path.glob("cache/??"))


# --- numbers that are none --------------------------------------------------------------------------------------------


def all_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: torch.full_like(value, float("nan")) for name, value in tensors.items()})


@pytest.mark.parametrize(
    ("component", "what", "where"),
    [
        ("vae", "the latents of an image are not finite", "dogs/"),
        ("text encoder", "the encoding of a caption is not finite", "'"),
    ],
)
def test_encodings_that_are_not_finite_are_refused_and_not_kept(make_config, spoiled, tmp_path, component, what, where):
    changes = spoiled(component, edited(all_nan))
    with pytest.raises(UsageError, match=what) as caught:
        train(make_config(cache__dir=str(tmp_path / "cache"), **changes))
    assert str(caught.value.where).startswith(where)
    assert train(make_config(cache__dir=str(tmp_path / "cache"))).reason == "finished", "the failed start is no run"


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_and_keeps_the_checkpoint(
    make_config, tmp_path, monkeypatch
):
    config = make_config(checkpoint__every=2, checkpoint__dir=str(tmp_path / "whole/run"))
    train(config)
    config = make_config(checkpoint__every=2, checkpoint__dir=str(tmp_path / "stopped/run"))
    original, calls = step_module.reduce_loss, []

    def spoil(*arguments, **options):
        calls.append(1)
        losses = original(*arguments, **options)
        return losses * float("nan") if len(calls) == 5 else losses

    monkeypatch.setattr(step_module, "reduce_loss", spoil)
    with pytest.raises(UsageError, match="the loss is not finite at step 5") as caught:
        train(config)
    assert "dogs/" in caught.value.where and "sigma 0." in caught.value.where
    assert "the update was not applied" in caught.value.why
    folder = RunFolder(tmp_path / "stopped/run", "run")
    assert read_state(list_checkpoints(folder)[-1]).position.step == 4
    end = read_events(folder.events)[-1]
    assert end["kind"] == "run_end" and end["reason"].startswith("failed: the loss is not finite at step 5")
    train(config, resume="auto")
    assert folder.final.read_bytes() == (tmp_path / "whole/run/run.safetensors").read_bytes()


# --- disks ------------------------------------------------------------------------------------------------------------


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("key", ["checkpoint.dir", "cache.dir"])
def test_a_file_in_the_way_of_a_folder_is_told(make_config, tmp_path, key):
    (tmp_path / "taken").touch()
    refusal(make_config(**{key.replace(".", "__"): str(tmp_path / "taken" / "deeper")}), str(tmp_path / "taken"), key)


def test_a_read_only_folder_is_told(make_config, monkeypatch):
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", read_only)
    with pytest.raises(UsageError, match=r"cannot write to the run folder(.|\n)*checkpoint\.dir(.|\n)*Read-only"):
        train(make_config())


def test_a_full_disk_costs_one_checkpoint_and_nothing_else(make_config, tmp_path, monkeypatch):
    original = streams_module.write_values

    def write(value, file):
        if "step-000004" in file.name:
            full_disk()
        original(value, file)

    monkeypatch.setattr(streams_module, "write_values", write)
    assert train(make_config(checkpoint__every=2, checkpoint__state="every")).reason == "finished"
    folder = RunFolder(tmp_path / "out", "out")
    assert [path.name for path in list_checkpoints(folder)] == ["step-000002", "step-000006", "step-000007"]
    assert all(read_state(path) for path in list_checkpoints(folder))
    assert [path.name for path in folder.checkpoints.iterdir() if path.name.startswith(".")] == []
    [warning] = [event["message"] for event in read_events(folder.events) if event["kind"] == "warning"]
    assert warning == "the checkpoint of step 4 was not written: No space left on device; earlier ones are intact"


def test_a_full_disk_at_the_end_names_the_newest_checkpoint_and_a_resume_writes_the_file(
    make_config, tmp_path, monkeypatch
):
    train(make_config(checkpoint__dir=str(tmp_path / "whole/out")))
    original = trainer_module.export

    def save(run, network, plan, *, path, **options):
        if path.parent == tmp_path / "out":
            full_disk()
        return original(run, network, plan, path=path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "export", save)
        with pytest.raises(UsageError) as caught:
            train(make_config())
    assert "the adapter was not written" in str(caught.value)
    assert f"the newest checkpoint is {tmp_path / 'out/checkpoints/step-000007'}" in str(caught.value)
    assert "--resume" in caught.value.fix
    train(make_config(), resume="auto")
    assert (tmp_path / "out/out.safetensors").read_bytes() == (tmp_path / "whole/out/out.safetensors").read_bytes()


def test_a_full_disk_at_an_interrupt_is_told(make_config, tmp_path, monkeypatch):
    def interrupt(self, step, metrics):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Extensions, "on_step_end", interrupt)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "write_state", full_disk)
        with pytest.raises(UsageError, match=r"the checkpoint of step 3 was not written(.|\n)*there is no checkpoint"):
            train(make_config())
    assert read_events(tmp_path / "out/events.jsonl")[-1]["kind"] == "run_end"


def test_caching_on_a_full_disk_keeps_what_is_done_and_goes_on(make_config, tmp_path, monkeypatch):
    config = make_config(cache__dir=str(tmp_path / "cache"))
    written = []

    def almost_full(path):
        written.append(path)
        return atomic_path(path) if len(written) <= 8 else full_disk()

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "atomic_path", almost_full)
        with pytest.raises(UsageError, match=r"the cache cannot be written(.|\n)*what is cached already is kept"):
            train(config)
    entries = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("??/??/*")}
    assert len(entries) == 8
    cache_only(config)
    assert all(path.stat().st_mtime_ns == time for path, time in entries.items())
    assert train(config).reason == "finished"


# --- run folders ------------------------------------------------------------------------------------------------------


def test_what_is_no_checkpoint_cannot_be_resumed(make_config, tmp_path, pictures):
    for path in (tmp_path / "nothing", pictures, pictures / "0.png"):
        with pytest.raises(UsageError, match=r"checkpoint(.|\n)*--resume alone"):
            train(make_config(), resume=str(path))


def test_two_runs_never_share_a_folder(make_config, tmp_path):
    (tmp_path / "out").mkdir()
    with FolderLock(RunFolder(tmp_path / "out", "out")), pytest.raises(UsageError, match="another run is writing"):
        train(make_config())


def test_a_failed_start_can_be_tried_again_with_other_settings(make_config, tmp_path, spoiled):
    with pytest.raises(UsageError, match="not finite"):
        train(make_config(cache__dir=str(tmp_path / "cache"), **spoiled("vae", edited(all_nan))))
    assert (tmp_path / "out/events.jsonl").exists()
    assert train(make_config(network__rank=2)).reason == "finished"
    with pytest.raises(UsageError, match="the run folder is not empty"):
        train(make_config(network__rank=2))


def test_a_resume_without_a_checkpoint_begins_anew_and_says_so(make_config, tmp_path, messages, monkeypatch):
    def crash(self, step, metrics):
        if step == 3:
            raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(Extensions, "on_step_end", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train(make_config())
    assert train(make_config(), resume="auto").steps == 7
    assert "starting from the beginning" in messages()
    kinds = [(event["kind"], event.get("step")) for event in read_events(tmp_path / "out/events.jsonl")]
    assert kinds.index(("resume", 0)) > kinds.index(("step", 3))


def test_where_files_lie_and_how_many_workers_there_are_may_change_on_resume(make_config, tmp_path):
    train(make_config(train__steps=2, schedule__name="constant"))
    changes = {"cache__dir": str(tmp_path / "cache"), "data__workers": {"scan": 1, "cache": 0, "load": 0}}
    assert train(make_config(train__steps=3, schedule__name="constant", **changes), resume="auto").steps == 3
