"""`tuner sample`: the pictures of a run again, bit by bit; grids; adapters of every part; and what does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.fixtures.drawing import drawn as run
from tests.fixtures.drawing import recorded
from tuner.cli import sample as command
from tuner.cli.main import Parser, main
from tuner.core.adapters.files import save_adapter
from tuner.core.adapters.formats import format_by_name, key_maps
from tuner.core.adapters.network import network_tensors
from tuner.core.errors import UsageError
from tuner.core.registry import open_run
from tuner.core.train import blocks, sample
from tuner.core.train.mounting import read_extra
from tuner.core.train.pictures import read_settings
from tuner.core.train.run import train
from tuner.core.train.sample_memory import blocks_to_stream

PROMPT = "a red dog --w 64 --h 64 --s 2 --l 3 --n grass"
TWO_STEPS = {"train__steps": 2, "optimizer__lr": 2e-2}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


RUNS: dict[str, dict[str, Any]] = {
    "an adapter": {},
    "an adapter on everything, another kind": {
        "train__components": ["denoiser", "qwen3", "llm_adapter"], "network": {"type": "dora", "rank": 2},
    },
    "an encoder whose output the frozen adapter reads": {"train__components": ["denoiser", "qwen3"]},
    "a quantized base, texts encoded in every step": {
        "quantize": {"denoiser": "int8", "activations": "int8", "parity": {"loss": 1, "gradient": 1}},
        "cache__text": "off",
    },
    "an average, in bfloat16": {
        "ema": {"enabled": True, "decay": 0.5}, "sample": {"prompts": [PROMPT], "weights": "ema"},
        "precision": {"compute": "bf16"},
    },
    "an adapter at half its strength": {"sample": {"prompts": [PROMPT], "adapter_strength": 0.5}},
    "a whole model": {"train__mode": "full", "network": {}, "optimizer__lr": 1e-3},
}  # fmt: skip


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_run_draws_the_picture_of_its_training_again_bit_by_bit(make_config, tmp_path, changes):
    changes = {**TWO_STEPS, "sample": {"prompts": [PROMPT]}, **changes}
    with recorded() as before:
        train(make_config(**changes))
    base, trained = before
    ema = ["--ema"] if "ema" in changes else []
    [again] = run(tmp_path / "out", *ema)
    assert torch.equal(again, trained)
    assert not torch.equal(base, trained)
    [preview] = (tmp_path / "out/samples/step-000002").glob("0*.png")
    with Image.open(preview) as one, Image.open(tmp_path / "samples/001/000.png") as other:
        assert one.tobytes() == other.tobytes()
    [repeated] = run(tmp_path / "out", "--like", preview, "--out", tmp_path / "again")
    assert torch.equal(repeated, trained)
    [of_base] = (tmp_path / "out/samples").glob("base-*/000.png")
    assert torch.equal(run(tmp_path / "out", "--like", of_base)[0], base)


# --- adapters and grids -----------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(make_config, tmp_path):
    """(name, components) -> a file of an adapter with values that act."""

    def make(name: str = "a", components: tuple[str, ...] = ("denoiser",), seed: int = 5, **changes: Any) -> Path:
        opened = open_run(make_config(train__components=list(components), **changes))
        net = opened.model.build_network(opened.model.load_models(components))
        generator = torch.Generator().manual_seed(seed)
        for parameter in net.module.parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        path = tmp_path / f"{name}.safetensors"
        return save_adapter(network_tensors(net), format_by_name(key_maps(opened.facts), None), path, {})

    return make


@pytest.fixture
def bare(model_files, tmp_path) -> Path:
    """A configuration for pictures: a model section and nothing that belongs to training."""
    precision = {"compute": "fp32", "text_encoder": {"qwen3": "fp32", "llm_adapter": "fp32"}}
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"model": model_files, "precision": precision, "log": {"plain": True}}))
    return path


def test_a_grid_has_every_prompt_seed_and_strength_and_tells_it(adapter, bare, tmp_path, capsys):
    file = adapter()
    latents = run(
        bare, "--prompt", "a dog --s 1", "--prompt", "a cat --s 2 --l 2", "--size", "96x64", "--cfg", "1",
        "--adapter", f"{file}:2", "--adapter-strengths", "0,0.5", "--seed", "3,4", "--out", "grid", "--json",
    )  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert [(each["text"], each["seed"], [a["strength"] for a in each["adapters"]]) for each in told["images"]] == [
        (text, seed, strengths) for text in ("a dog", "a cat") for seed in (3, 4) for strengths in ([], [1.0])
    ]
    assert [each["path"] for each in told["images"]] == [f"grid/{number:03d}.png" for number in range(8)]
    assert {(each["width"], each["height"]) for each in told["images"]} == {(96, 64)}
    assert [each["steps"] for each in told["images"]] == [1] * 4 + [2] * 4
    for each, latent in zip(told["images"], latents, strict=True):
        assert read_settings(Path(each.pop("path"))) == each
        assert latent.shape == (1, 16, 8, 12)
    assert str(tmp_path) not in json.dumps(told["images"])
    with Image.open(told["sheet"]) as sheet:
        assert sheet.width > 2 * 224 and sheet.height > 4 * 224 > sheet.width
    plain = run(bare, "--prompt", "a dog --s 1", "--size", "96x64", "--cfg", "1", "--seed", "3,4")
    assert torch.equal(plain[0], latents[0]) and torch.equal(plain[1], latents[2])
    assert not torch.equal(latents[0], latents[1])


def test_adapters_add_up_and_equal_merged_ones(adapter, bare):
    one, two = adapter("one"), adapter("two", seed=6, network={"type": "lokr", "rank": 2})
    given = ["--prompt", PROMPT, "--adapter", f"{one}:0.5", "--adapter", f"{two}:-0.5"]
    [both] = run(bare, *given)
    merged = [{"path": str(one), "strength": 0.5}, {"path": str(two), "strength": -0.5}]
    [expected] = run(bare, "--prompt", PROMPT, "--set", f"model.merge={json.dumps(merged)}")
    torch.testing.assert_close(both, expected, rtol=1e-3, atol=1e-3)
    [alone] = run(bare, *given[:4])
    assert not torch.allclose(both, alone, rtol=1e-2, atol=1e-2)


def test_adapters_of_encoders_change_texts_by_their_strength(adapter, bare):
    file = adapter(components=("denoiser", "qwen3", "llm_adapter"))
    given = ["--prompt", PROMPT, "--adapter", file]
    zero, half, full = run(bare, *given, "--adapter-strengths", "0,0.5,1")
    [again] = run(bare, *given[:3], f"{file}:0.5")
    assert torch.equal(again, half) and not torch.equal(half, full)
    [base] = run(bare, "--prompt", PROMPT)
    assert torch.equal(zero, base)
    merged = json.dumps([{"path": str(file)}])
    [expected] = run(bare, "--prompt", PROMPT, "--set", f"model.merge={merged}", "--set", "cache.text=off")
    torch.testing.assert_close(full, expected, rtol=1e-3, atol=1e-3)


def test_a_picture_is_drawn_again_from_its_own_settings(adapter, bare, tmp_path, capsys):
    one, two = adapter("one"), adapter("two", seed=6)
    lines = tmp_path / "prompts.txt"
    lines.write_text("a dog --w 64 --h 64 --s 3 --ss heun --l 4 --n cat --d 9\n", encoding="utf-8")
    config = json.loads(bare.read_text())
    config["sample"] = {"cfg_rescale": 0.5, "adapters": [{"path": str(two), "strength": 0.25}]}
    bare.write_text(json.dumps(config))
    _, first = run(bare, "--prompts", lines, "--adapter", one, "--adapter-strengths", "0,0.5")
    picture = tmp_path / "samples/001/001.png"
    settings = read_settings(picture)
    assert settings is not None
    assert [(each["file"], each["strength"]) for each in settings["adapters"]] == [
        ("one.safetensors", 0.5), ("two.safetensors", 0.25),
    ]  # fmt: skip
    assert (settings["sampler"], settings["cfg_rescale"], settings["seed"]) == ("heun", 0.5, 9)
    moved = one.rename(tmp_path / "renamed.safetensors")
    assert torch.equal(run(bare, "--like", picture, "--adapter", moved)[0], first)
    assert not torch.equal(run(bare, "--like", picture, "--adapter", moved, "--seed", "10")[0], first)
    run(bare, "--like", picture, "--adapter", moved, "--set", "quantize.denoiser=int8")
    assert "quantize was {} and is {'denoiser': 'int8'}: the picture will differ" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"made with one\.safetensors, which is not here"):
        sample_error(bare, "--like", picture)
    with pytest.raises(UsageError, match="was made without this adapter"):
        sample_error(bare, "--like", picture, "--adapter", moved, "--adapter", adapter("three", seed=7))


def test_a_picture_of_a_grid_is_the_same_alone(adapter, bare):
    file, texts = adapter(components=("denoiser", "qwen3")), ["a dog", "a long line about a cat on green grass"]
    exact = ["--set", "cache.dtype=fp32", "--set", "cache.text_batch_size=8"]
    given = ["--size", "64x64", "--steps", "1", "--cfg", "2", "--seed", "3", *exact]
    prompts = [part for text in texts for part in ("--prompt", text)]
    grid = run(bare, *prompts, *given, "--adapter", file, "--adapter-strengths", "0,1", "--out", "grid")
    for number, latents in enumerate(grid):
        picture, strength = Path(f"grid/{number:03d}.png"), number % 2
        [alone] = run(bare, "--like", picture, *exact, *(["--adapter", file] if strength else []), "--out", f"{number}")
        assert torch.equal(alone, latents)
        assert Path(f"{number}/000.png").read_bytes() == picture.read_bytes()
    base = run(bare, *prompts, *given)
    assert all(torch.equal(one, other) for one, other in zip(base, grid[::2], strict=True))


def test_a_picture_of_a_whole_model_is_drawn_again_from_the_file_that_made_it(make_config, tmp_path, capsys):
    average = {"enabled": True, "decay": 0.5}
    changes = {"train__mode": "full", "network": {}, "ema": average, "checkpoint__every": 1, **TWO_STEPS}
    train(make_config(**changes))
    for given in (["--step", "1"], ["--ema"], ["--ema", "--step", "1"]):
        [first] = run(tmp_path / "out", "--prompt", PROMPT, *given)
        picture = sorted(Path("samples").glob("*/000.png"))[-1]
        assert torch.equal(run(tmp_path / "out", "--like", picture)[0], first)
    assert "differ" not in capsys.readouterr().err


def test_what_makes_another_picture_of_the_same_settings_is_told(bare, model_files, tmp_path, capsys):
    run(bare, "--prompt", PROMPT, "--out", "one")
    path = Path(model_files["path"])
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    tensors["net.blocks.0.mlp.layer1.weight"] += 1
    (tmp_path / "other").mkdir()
    save_file(tensors, tmp_path / "other" / path.name)
    run(bare, "--like", "one/000.png")
    assert "differ" not in capsys.readouterr().err
    run(bare, "--like", "one/000.png", "--set", f"model.path={tmp_path / 'other' / path.name}")
    assert f"the weights are not those of {path.name} then: the picture will differ" in capsys.readouterr().err
    run(bare, "--like", "one/000.png", "--set", "latents.tiling=64")
    assert "latents.tiling was None and is 64: the picture will differ" in capsys.readouterr().err
    run(bare, "--like", "one/000.png", "--set", "precision.vae=bf16")
    assert "precision.vae was fp32 and is bf16: the picture will differ" in capsys.readouterr().err


def test_streamed_blocks_draw_the_same_and_are_chosen_when_memory_is_short(
    make_config, six_blocks, monkeypatch, caplog
):
    path = Path("six.json")
    config = make_config(model=six_blocks, sample={"prompts": [PROMPT]})
    path.write_text(json.dumps({name: config[name] for name in ("model", "precision", "sample")}))
    [plain] = run(path)
    [asked] = run(path, "--set", "memory.swap_blocks=4")
    assert torch.equal(asked, plain)
    monkeypatch.setattr(sample, "free_memory", lambda device: 1)
    found: list[int] = []
    original = blocks.stream_blocks
    monkeypatch.setattr(
        blocks,
        "stream_blocks",
        lambda model, lists, count, device: found.append(count) or original(model, lists, count, device),
    )
    assert torch.equal(run(path)[0], plain)
    opened = open_run(config)
    needs = [blocks_to_stream(opened.config, opened.facts, [(64, 64)], free) for free in (None, 1e12, 3e6, 1)]
    assert found == [4] and needs[:2] == [0, 0] and needs[3] == 4
    assert blocks_to_stream(opened.config, opened.facts, [(64, 64)], 1e12, adapters=10**12) == 4


def test_the_weights_of_a_step_can_be_chosen(make_config, tmp_path, capsys):
    with recorded() as before:
        train(make_config(sample={"prompts": [PROMPT], "every": 1}, checkpoint__every=1, **TWO_STEPS))
    _, first, second = before
    assert torch.equal(run(tmp_path / "out", "--step", "1")[0], first)
    # The last checkpoint has the bytes of the final file, and another name.
    run(tmp_path / "out", "--step", "2", "--out", "last")
    run(tmp_path / "out", "--like", "last/000.png", "--out", "again")
    assert Path("again/000.png").read_bytes() == Path("last/000.png").read_bytes()
    assert torch.equal(run(tmp_path / "out")[0], second)
    (tmp_path / "out").rename(tmp_path / "moved")
    preview = tmp_path / "moved/samples/step-000001/000.png"
    assert torch.equal(run(tmp_path / "moved", "--like", preview)[0], first)
    assert "differ" not in capsys.readouterr().err
    (tmp_path / "moved").rename(tmp_path / "out")
    train(make_config(checkpoint__dir=str(tmp_path / "other"), checkpoint__every=1, **TWO_STEPS))
    run(tmp_path / "other", "--like", tmp_path / "out/samples/step-000001/000.png")
    assert f"made by another run, in {tmp_path / 'out'}: the picture will differ" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no weights of step 3") as caught:
        sample_error(tmp_path / "out", "--step", "3")
    assert "1, 2" in str(caught.value.why)
    with pytest.raises(UsageError, match="no average"):
        sample_error(tmp_path / "out", "--ema")


def test_a_run_that_quantized_the_rest_of_split_weights_is_told(make_config, tmp_path, capsys):
    network = {"rank": 4, "init": "loftq"}
    train(make_config(network=network, quantize={"denoiser": "int8"}, **TWO_STEPS))
    run(tmp_path / "out", "--prompt", PROMPT)
    assert "network.init of this run quantized other weights" in capsys.readouterr().err
    run(tmp_path / "out", "--prompt", PROMPT, "--set", "quantize.denoiser=null")
    assert "network.init" not in capsys.readouterr().err


# --- sample.adapters --------------------------------------------------------------------------------------------------


def test_further_adapters_act_in_the_pictures_of_a_run_and_in_nothing_else(make_config, adapter, tmp_path):
    extra = adapter("extra", network={"type": "loha", "rank": 2})
    files, drawn = {}, {}
    for name, adapters in (("plain", []), ("extra", [{"path": str(extra), "strength": 0.5}])):
        with recorded() as drawn[name]:
            out = tmp_path / name
            section = {"prompts": [PROMPT], "at_start": True, "adapters": adapters}
            train(make_config(checkpoint__dir=str(out), checkpoint__name="x", sample=section, **TWO_STEPS))
        files[name] = (out / "x.safetensors").read_bytes()
    assert files["plain"] == files["extra"]
    assert all(not torch.equal(one, other) for one, other in zip(*drawn.values(), strict=True))
    assert torch.equal(run(tmp_path / "extra")[0], drawn["extra"][-1])
    settings = read_settings(tmp_path / "extra/samples/step-000002/000.png")
    assert settings is not None and settings["extra"][0]["strength"] == 0.5
    [again] = run(tmp_path / "extra", "--like", tmp_path / "extra/samples/step-000002/000.png")
    assert torch.equal(again, drawn["extra"][-1])


def test_the_strength_in_pictures_changes_them_and_neither_the_base_nor_the_file(make_config, tmp_path):
    files, drawn = [], {}
    for strength in (1.0, 0.25, -1.0):
        out = tmp_path / f"at{strength}"
        section = {"prompts": [PROMPT], "adapter_strength": strength}
        with recorded() as drawn[strength]:
            train(make_config(checkpoint__dir=str(out), checkpoint__name="x", sample=section, **TWO_STEPS))
        files.append((out / "x.safetensors").read_bytes())
    assert len(set(files)) == 1
    bases, trained = zip(*drawn.values(), strict=True)
    assert all(torch.equal(base, bases[0]) for base in bases)
    far = [float((picture - bases[0]).abs().max()) for picture in trained]
    assert far[0] > 2 * far[1] > 0
    assert not torch.equal(trained[0], trained[2])
    settings = read_settings(tmp_path / "at0.25/samples/step-000002/000.png")
    assert settings is not None and settings["adapter_strength"] == 0.25


def test_a_further_adapter_cannot_change_texts_that_are_encoded_once(make_config, adapter):
    extra = adapter(components=("denoiser", "qwen3"))
    section = {"prompts": [PROMPT], "adapters": [{"path": str(extra)}]}
    with pytest.raises(UsageError, match=r"changes qwen3, whose output is encoded once") as caught:
        train(make_config(sample=section))
    assert "sample.adapters[0]" in str(caught.value.where)
    opened = open_run(make_config(sample=section, cache__text="off"))
    assert [each.components for each in read_extra(opened.config, opened.facts)] == [("denoiser", "qwen3")]


# --- what cannot be done ----------------------------------------------------------------------------------------------


def sample_error(*arguments: str | Path) -> None:
    """`tuner sample` with the error itself instead of its text."""
    parser = Parser(prog="tuner sample")
    command.add_arguments(parser)
    command.run(parser.parse_args(list(map(str, arguments))))


def test_an_adapter_of_another_family_is_named_as_such(bare, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file(
        {
            "lora_unet_double_blocks_0_img_mlp_0.lora_down.weight": torch.zeros(1, 4),
            "lora_unet_double_blocks_0_img_mlp_0.lora_up.weight": torch.zeros(4, 1),
        },
        path,
    )
    with pytest.raises(UsageError, match="this adapter is for flux, the model is anima") as caught:
        sample_error(bare, "--prompt", "x", "--adapter", path)
    assert str(path) in str(caught.value.where)
    save_file({"something.weight.else": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match="belong to no module"):
        sample_error(bare, "--prompt", "x", "--adapter", path)


def test_an_adapter_of_a_training_that_went_wrong_is_refused(bare, adapter, tmp_path):
    path = adapter()
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, tmp_path / "broken.safetensors")
    with pytest.raises(UsageError, match="values that are not finite"):
        sample_error(bare, "--prompt", "x", "--adapter", tmp_path / "broken.safetensors")


def test_an_adapter_of_a_larger_model_is_refused_before_weights_are_read(bare, adapter, six_blocks, monkeypatch):
    later = {"network": {"rank": 2, "blocks": {"blocks": ["4-5"]}}, "model": six_blocks}
    partly = {"network": {"rank": 2}, "model": six_blocks}
    one, two = adapter("later", **later), adapter("partly", **partly)
    monkeypatch.setattr(sample, "load_components", None)
    with pytest.raises(UsageError, match="fits no layer of this model"):
        sample_error(bare, "--prompt", "x", "--adapter", one)
    with pytest.raises(UsageError, match=r"no layer for denoiser:blocks\.2"):
        sample_error(bare, "--prompt", "x", "--adapter", two)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "what should be drawn"),
        (["--prompt", "x", "--adapter-strengths", "0,1"], "no adapter whose strength could change"),
        (["--prompt", "x", "--prompts", "y.txt"], "do not go together"),
        (["--prompt", "x", "--set", "log=5"], "log: expected an object"),
        (["--prompt", "x", "--step", "3"], "--step needs the folder of a run"),
        (["--prompt", "x", "--step", "0"], "--step needs the folder of a run"),
        (["--prompt", "x", "--seed", "18446744073709551616"], "seed 18446744073709551616 is too large"),
        (["--prompt", "x", "--adapter", "a.safetensors:nan"], "a strength must be finite, not nan"),
        (["--prompt", "x", "--adapter-strengths", "0,inf"], "'0,inf' is no list of numbers"),
        (["--prompt", "x", "--adapter", "none.safetensors"], r"none\.safetensors"),
        (["--prompt", "x", "--set", "sample.sampler=plms"], "sample.sampler"),
        (["--prompt", "x", "--cfg", "1", "--set", "sample.cfg_rescale=0.5"], "cfg_rescale has no effect"),
        (["--prompt", "x", "--set", "sample.embedded_guidance=3"], "embedded_guidance"),
        (["--prompt", "x", "--size", "64"], "no size such as"),
        (["--prompt", "x", "--seed", "a"], "no list of whole numbers"),
        (["--prompt", "x", "--set", "sample=5"], "sample is 5, not an object"),
        (["--prompt", "x", "--set", "sample.adapter_strength=0.5"], "sample.adapter_strength has no effect here"),
        (["--like", "old.png"], "cannot read the picture"),
        (["--like", "old.png", "--steps", "3"], "--steps has no effect with --like"),
        (["--like", "old.png", "--cfg", "0"], "--cfg has no effect with --like"),
        (["--like", "old.png", "--set", "sample.shift=2"], "--set sample.shift has no effect with --like"),
        (["--like", "old.png", "--adapter", "a.safetensors:0.5"], "strength of --adapter a.safetensors has no effect"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_drawn_is_told_before_anything_is_loaded(bare, monkeypatch, arguments, message):
    monkeypatch.setattr(sample, "load_components", None)
    with pytest.raises(UsageError) as caught:
        sample_error(bare, *arguments)
    assert re.search(message, str(caught.value))


def test_pictures_are_never_written_over_or_beside_others(bare, tmp_path, monkeypatch):
    small = ["--prompt", "x --s 1", "--size", "64x64", "--cfg", "1"]
    run(bare, *small)
    run(bare, *small)
    assert sorted(path.as_posix() for path in Path("samples").rglob("*.png")) == [
        "samples/001/000.png", "samples/002/000.png",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="pictures in this folder already"):
        sample_error(bare, *small, "--out", "samples/001")
    Image.new("RGB", (8, 8)).save("foreign.png")
    bytes_of = Path("foreign.png").read_bytes()
    original = sample.draw_latents

    def draw(*args: Any, **kwargs: Any) -> torch.Tensor:
        Path("foreign.png").rename("samples/late/000.png")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(UsageError, match="another program has written"):
        patch.setattr(sample, "draw_latents", draw)
        sample_error(bare, *small, "--out", "samples/late")
    Path("samples/late/000.png").rename("foreign.png")
    assert Path("foreign.png").read_bytes() == bytes_of
    with pytest.raises(UsageError, match="does not say how it was made"):
        sample_error(bare, "--like", "foreign.png")
    with pytest.raises(UsageError, match="this folder holds no run"):
        sample_error(tmp_path / "samples")
    with pytest.raises(UsageError, match="a file of weights, a configuration is wanted"):
        sample_error("style.safetensors", "--prompt", "x")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "2 of 3 pictures are in samples/001"),
        (torch.OutOfMemoryError("too much"), 2, "not enough memory"),
    ],
)
def test_what_is_finished_before_a_break_is_written(bare, monkeypatch, capsys, error, code, told):
    drawn: list[torch.Tensor] = []
    original = sample.draw_latents

    def draw(*args: Any, **kwargs: Any) -> torch.Tensor:
        if len(drawn) == 2:
            raise error
        drawn.append(original(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(sample, "draw_latents", draw)
    given = ["sample", str(bare), "--prompt", "x --s 1", "--size", "64x64", "--cfg", "1"]
    assert main([*given, "--seed", "1,2,3"]) == code
    assert told in capsys.readouterr().err
    assert sorted(each.name for each in Path("samples/001").iterdir()) == ["000.png", "001.png"]
    # Nothing remains of what never began.
    assert main([*given, "--out", "none"]) == code
    assert not Path("none").exists()


def test_a_picture_that_is_no_number_anywhere_is_black_and_told(bare, monkeypatch, capsys):
    monkeypatch.setattr(sample, "draw_latents", lambda *args, **kwargs: torch.full((1, 16, 8, 8), torch.nan))
    assert main(["sample", str(bare), "--prompt", "x", "--size", "64x64"]) == 0
    assert "samples/001/000.png: values that are not finite are black" in capsys.readouterr().err
    with Image.open("samples/001/000.png") as image:
        assert image.getextrema() == ((0, 0),) * 3


def test_compiled_blocks_draw_every_cell_of_a_grid(adapter, bare):
    one, two = adapter("one"), adapter("two", seed=6)
    given = ["--prompt", "a dog --w 64 --h 64 --s 1 --l 1", "--adapter", one, "--adapter", two]
    given += ["--adapter-strengths", "0,1"]
    compiled = run(bare, *given, "--set", "compile.enabled=true", "--set", "compile.backend=eager")
    for latents, expected in zip(compiled, run(bare, *given), strict=True):
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
