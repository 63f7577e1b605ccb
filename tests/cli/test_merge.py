"""Merging adapters into checkpoints and into each other, through the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.fixtures.tiny_parts import clip_shapes, random_tensors
from tests.helpers import delta_weight, golden, golden_path
from tuner.cli.main import main
from tuner.core.adapters.files import read_adapter, save_adapter
from tuner.core.adapters.formats import format_by_name, modules_of
from tuner.core.files import safetensors_header
from tuner.plugins.flux.names import MAPS

BASE, LORA = "flux/dev_bfl.safetensors", "flux/lora_sdscripts.safetensors"


def path(name: str) -> str:
    return str(golden_path(name))


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def merge(out: Path, *words: str, model: str = "flux") -> Path:
    assert main(["merge", *words, "--model", model, "--out", str(out)]) == 0
    return out


def test_a_merged_checkpoint_is_the_published_one_in_the_layout_of_its_base(out):
    merged = load_file(merge(out, f"{path(LORA)}:0.8", "--base", path(BASE)))
    base, wanted = golden(BASE), golden("flux/lora_merged_bfl.safetensors")
    assert list(merged) == list(base)
    for name, value in merged.items():
        expected = wanted.get(name, base[name])
        assert value.dtype == base[name].dtype
        assert torch.equal(value, base[name]) == (name not in wanted)
        torch.testing.assert_close(value, expected, rtol=0, atol=2e-5)
    assert metadata_of(out)["modelspec.merged_from"] == "lora_sdscripts:0.8"


@pytest.mark.parametrize("flavour", ["sd3m", "sd35m"])
def test_the_other_family_with_joint_matrices_agrees_too(out, flavour):
    files = (f"sd3/{flavour}_lora_sdscripts.safetensors", f"sd3/{flavour}_weights_f16.safetensors")
    merged = load_file(merge(out, path(files[0]), "--base", path(files[1]), "--dtype", "fp32", model="sd3"))
    for name, wanted in golden(f"sd3/{flavour}_lora_merged_some.safetensors").items():
        torch.testing.assert_close(merged[name], wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("strength", ["0.6", "1.0"])
def test_parts_of_a_text_encoder_go_into_its_own_file(out, strength):
    bases = ("--base", path("anima/e2e_weights.safetensors"), path("anima/qwen3_weights.safetensors"))
    merge(out, f"{path('anima/lora_sdscripts.safetensors')}:{strength}", *bases, model="anima")
    merged = load_file(out)
    start = f"merged.mult{strength}."
    compared = {
        name: value for name, value in golden("anima/lora_effect.safetensors").items() if name.startswith(start)
    }
    assert len(compared) == 5
    for name, wanted in compared.items():
        torch.testing.assert_close(merged[f"net.{name.removeprefix(start)}"], wanted, rtol=0, atol=3e-5)
    encoder, before = load_file(out.with_name("out_qwen3.safetensors")), golden("anima/qwen3_weights.safetensors")
    assert list(encoder) == list(before)
    assert not torch.equal(encoder["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(encoder["model.norm.weight"], before["model.norm.weight"])


def test_a_folder_in_the_layout_of_diffusers_gets_the_same_values(out, tmp_path):
    folder = tmp_path / "folder" / "transformer"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(golden_path("flux/dev_diffusers.safetensors").read_bytes())
    merged = load_file(merge(out, f"{path(LORA)}:0.8", "--base", str(folder.parent)))
    joint = golden("flux/lora_merged_bfl.safetensors")["double_blocks.0.img_attn.qkv.weight"]
    rows = [merged[f"transformer_blocks.0.attn.to_{letter}.weight"] for letter in "qkv"]
    torch.testing.assert_close(torch.cat(rows), joint, rtol=0, atol=2e-5)


def test_strengths_of_blocks_scale_and_take_out(out):
    words = (
        path(LORA),
        "--base",
        path(BASE),
        "--strength",
        r".*=0",
        "--strength",
        r"single_transformer_blocks\.1\..*=0.8",
    )
    merged = load_file(merge(out, *words))
    base, wanted = golden(BASE), golden("flux/lora_merged_bfl.safetensors")
    for name, value in merged.items():
        inside = name.startswith("single_blocks.1.") and name in wanted
        torch.testing.assert_close(value, wanted[name] if inside else base[name], rtol=0, atol=2e-5)


def test_a_strength_that_is_no_number_is_told(out, capsys):
    assert main(["merge", f"{path(LORA)}:0,8", "--base", path(BASE), "--model", "flux", "--out", str(out)]) == 2
    assert "cannot read the strength '0,8'" in capsys.readouterr().err
    assert not out.exists()


def test_a_pattern_that_matches_nothing_is_an_error(out, capsys):
    words = ["merge", path(LORA), "--base", path(BASE), "--strength", "single_blocks.*=0", "--model", "flux"]
    assert main([*words, "--out", str(out)]) == 2
    assert "matches no module of the adapters" in capsys.readouterr().err
    assert not out.exists()


def test_a_target_that_fits_nothing_is_an_error(out, tmp_path, capsys):
    tensors = {name: value for name, value in golden(BASE).items() if not name.startswith("single_blocks.1.")}
    save_file(tensors, tmp_path / "shallow.safetensors")
    words = ["merge", path(LORA), "--base", str(tmp_path / "shallow.safetensors"), "--model", "flux"]
    assert main([*words, "--out", str(out)]) == 2
    assert "have no weight denoiser:single_transformer_blocks.1." in capsys.readouterr().err
    assert not out.exists()


def test_parts_for_an_encoder_that_was_not_given_are_not_lost(out, capsys):
    words = ["merge", path("anima/lora_sdscripts.safetensors"), "--base", path("anima/e2e_weights.safetensors")]
    assert main([*words, "--model", "anima", "--out", str(out)]) == 2
    assert "add qwen3=FILE to --base, or --strength 'qwen3:.*=0'" in capsys.readouterr().err
    merge(out, *words[1:], "--strength", "qwen3:.*=0", model="anima")
    assert not out.with_name("out_qwen3.safetensors").exists()


def test_a_file_of_another_model_is_refused(out, capsys):
    words = ["merge", path(LORA), "--base", path("sd3/sd3m_weights_f16.safetensors"), "--model", "flux"]
    assert main([*words, "--out", str(out)]) == 2
    assert "holds no weights of this model" in capsys.readouterr().err


def test_a_base_of_scaled_weights_is_refused(out, tmp_path, capsys):
    tensors = golden(BASE) | {"double_blocks.0.img_mlp.0.scale_weight": torch.ones(())}
    save_file(tensors, tmp_path / "scaled.safetensors")
    words = ["merge", path(LORA), "--base", str(tmp_path / "scaled.safetensors"), "--model", "flux"]
    assert main([*words, "--out", str(out)]) == 2
    assert "these are scaled 8-bit weights" in capsys.readouterr().err


def test_an_encoder_of_the_model_is_recognised(out, tmp_path):
    clip = tmp_path / "clip_l.safetensors"
    save_file(random_tensors(clip_shapes(width=20, layers=1, projection=None), torch.Generator()), clip)
    module = "text_model.encoder.layers.0.mlp.fc1"
    rows, width = load_file(clip)[f"{module}.weight"].shape
    parts = {"down": torch.ones(1, width), "up": torch.ones(rows, 1), "alpha": torch.tensor(1.0)}
    lora = tmp_path / "clip.safetensors"
    save_adapter({f"clip_l:{module}.{part}": value for part, value in parts.items()}, MAPS.formats[0], lora, {})
    merge(out, str(lora), "--base", path(BASE), str(clip))
    changed = load_file(out.with_name("out_clip_l.safetensors"))[f"{module}.weight"]
    torch.testing.assert_close(changed, load_file(clip)[f"{module}.weight"] + 1)


def sum_formula(files: dict[str, float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for name, strength in files.items():
        tensors = read_adapter(golden_path(name), MAPS).tensors
        for component, module in modules_of(tensors):
            key = f"{component}:{module}"
            value = strength * delta_weight(tensors, key)
            total[key] = total[key] + value if key in total else value
    return total


def test_adapters_stacked_into_one_do_what_their_sum_does(out):
    files = {LORA: 0.7, "flux/lora_split_sdscripts.safetensors": -1.3}
    merge(out, *(f"{path(name)}:{strength}" for name, strength in files.items()), "--concat")
    read = read_adapter(out, MAPS)
    wanted = sum_formula(files)
    assert {f"{component}:{module}" for component, module in modules_of(read.tensors)} == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(delta_weight(read.tensors, key), value, rtol=1e-5, atol=1e-5)


def test_the_sum_cut_to_a_rank_is_the_best_of_that_rank(out, capsys):
    files = {LORA: 0.7, "flux/lora_split_sdscripts.safetensors": -1.3}
    words = (*(f"{path(name)}:{strength}" for name, strength in files.items()), "--format", "diffusers", "--rank", "3")
    merge(out, *words, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["max_rank"] == 3 and 0 < told["kept"] < 1
    read = read_adapter(out, MAPS)
    for key, value in sum_formula(files).items():
        u, s, vh = torch.linalg.svd(value, full_matrices=False)
        best = (u[:, :3] * s[:3]) @ vh[:3]
        torch.testing.assert_close(delta_weight(read.tensors, key), best, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((path(LORA), "--base", path(BASE), "--rank", "4"), "--rank is for merging adapters with each other"),
        ((path(LORA), "--concat", "--rank", "4"), "--concat keeps every rank"),
        ((path(LORA), "--strength", "half"), "cannot read the strength 'half'"),
        ((path(LORA), "--strength", ".*=0"), "nothing is left to merge"),
        ((f"{path(LORA)}:0",), "nothing is left to merge"),
        ((f"{path(LORA)}:nan",), "a strength must be finite, not nan"),
        ((path(LORA), "--strength", ".*=inf"), "a strength must be finite, not inf"),
    ],
)
def test_options_that_cannot_act_are_refused(words, message, out, capsys):
    assert main(["merge", *words, "--model", "flux", "--out", str(out)]) == 2
    assert message in capsys.readouterr().err


def test_a_source_is_never_replaced(tmp_path, capsys):
    copy = tmp_path / "base.safetensors"
    copy.write_bytes(golden_path(BASE).read_bytes())
    words = ["merge", path(LORA), "--base", str(copy), "--model", "flux", "--overwrite", "--out", str(copy)]
    assert main(words) == 2
    assert "would replace the file it is made of" in capsys.readouterr().err
    assert copy.read_bytes() == golden_path(BASE).read_bytes()


def lycoris(file: Path, module: str, parts: dict[str, torch.Tensor]) -> str:
    """An adapter of one module of the denoiser, as LyCORIS names it."""
    save_adapter(
        {f"denoiser:{module}.{part}": value for part, value in parts.items()}, format_by_name(MAPS, "lycoris"), file, {}
    )
    return str(file)


def test_kinds_that_do_not_add_up_say_so(out, tmp_path, capsys):
    parts = {"down": torch.ones(1, 48), "up": torch.ones(48, 1), "dora_scale": torch.ones(48, 1)}
    dora = lycoris(tmp_path / "dora.safetensors", "transformer_blocks.0.attn.to_q", {**parts, "alpha": torch.ones(())})
    assert main(["merge", dora, "--model", "flux", "--out", str(out)]) == 2
    assert "merge them into a checkpoint with --base" in capsys.readouterr().err
    merge(out, dora, "--base", path(BASE))
    assert safetensors_header(out).metadata["modelspec.merged_from"] == "dora:1"


def changes(rank: int) -> dict[str, tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Kind to parts of one module [48, 48] and what they add to its weight, written down a second time."""
    generator = torch.Generator().manual_seed(rank)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    alpha = torch.tensor(1.5)
    a, b, c, d = drawn(48, rank), drawn(rank, 48), drawn(48, rank), drawn(rank, 48)
    w1, w2, x, y = drawn(4, 4), drawn(12, 12), drawn(12, rank), drawn(rank, 12)
    diff = drawn(48, 48)
    loha = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": alpha}
    return {
        "lora": ({"down": b, "up": a, "alpha": alpha}, a @ b * (1.5 / rank)),
        "loha": (loha, (a @ b) * (c @ d) * (1.5 / rank)),
        "lokr": ({"lokr_w1": w1, "lokr_w2": w2, "alpha": alpha}, torch.kron(w1, w2)),
        "thin lokr": (
            {"lokr_w1": w1, "lokr_w2_a": x, "lokr_w2_b": y, "alpha": alpha},
            torch.kron(w1, x @ y) * (1.5 / rank),
        ),
        "full": ({"diff": diff}, diff),
    }


@pytest.mark.parametrize("second", ["lora", "loha", "lokr", "thin lokr", "full"])
@pytest.mark.parametrize("first", ["lora", "loha", "full"])
def test_kinds_that_do_not_look_at_the_weight_add_up_exactly(out, tmp_path, first, second):
    module = "transformer_blocks.0.attn.to_q"
    (one, change), (two, other) = changes(2)[first], changes(3)[second]
    merge(
        out,
        f"{lycoris(tmp_path / 'a.safetensors', module, one)}:0.7",
        f"{lycoris(tmp_path / 'b.safetensors', module, two)}:-1.3",
    )
    merged = load_file(
        merge(tmp_path / "model.safetensors", str(out), "--base", path("flux/dev_diffusers.safetensors"))
    )
    wanted = golden("flux/dev_diffusers.safetensors")[f"{module}.weight"] + 0.7 * change - 1.3 * other
    torch.testing.assert_close(merged[f"{module}.weight"], wanted, rtol=0, atol=1e-5)


def test_a_sum_that_is_dense_is_cut_to_a_rank_too(out, tmp_path, capsys):
    module = "transformer_blocks.0.attn.to_q"
    parts, change = changes(2)["full"]
    merge(out, lycoris(tmp_path / "a.safetensors", module, parts), "--rank", "3", "--json")
    assert json.loads(capsys.readouterr().out)["max_rank"] == 3
    u, s, vh = torch.linalg.svd(change)
    read = read_adapter(out, MAPS)
    torch.testing.assert_close(
        delta_weight(read.tensors, f"denoiser:{module}"), (u[:, :3] * s[:3]) @ vh[:3], rtol=0, atol=1e-4
    )


def test_an_adapter_with_values_that_are_no_numbers_goes_nowhere(out, tmp_path, capsys):
    tensors = golden(LORA)
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    save_file(tensors | {name: tensors[name] * float("nan")}, tmp_path / "broken.safetensors")
    for words in ((), ("--base", path(BASE)), ("--rank", "2")):
        assert main(["merge", str(tmp_path / "broken.safetensors"), *words, "--model", "flux", "--out", str(out)]) == 2
        assert "is not finite" in capsys.readouterr().err
    assert not out.exists()


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for target, message in ((tmp_path / "file" / "new", "cannot be written"), (tmp_path, "this is a folder")):
        assert main(["merge", path(LORA), "--model", "flux", "--overwrite", "--out", str(target)]) == 2
        assert message in capsys.readouterr().err


def test_a_disk_that_fills_up_leaves_nothing_behind(out, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tuner.core.adapters.streams.write_values", full)
    assert main(["merge", path(LORA), "--base", path(BASE), "--model", "flux", "--out", str(out)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []


def test_convolutions_add_up_whatever_form_their_change_has(out, tmp_path):
    key, kernel = "x_embedder.proj.weight", (16, 2, 2)
    base = golden("sd3/sd3m_weights_f16.safetensors")[key].float()
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, *kernel, generator=generator), torch.randn(128, 3, 1, 1, generator=generator)
    diff = torch.randn(128, *kernel, generator=generator)
    name = "lora_unet_x_embedder_proj"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "a.safetensors")
    save_file({f"{name}.diff": diff}, tmp_path / "b.safetensors")
    files = [str(tmp_path / f"{which}.safetensors") for which in "ab"]
    product = torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    for given, wanted in ((files, product + diff), ([files[0], files[0]], 2 * product)):
        merge(out, *given, "--overwrite", model="sd3")
        words = (str(out), "--base", path("sd3/sd3m_weights_f16.safetensors"), "--dtype", "fp32", "--overwrite")
        merged = load_file(merge(tmp_path / "model.safetensors", *words, model="sd3"))
        torch.testing.assert_close(merged[key], base + wanted, rtol=0, atol=1e-5)
