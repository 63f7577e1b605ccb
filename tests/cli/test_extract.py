"""Adapters from the difference of two checkpoints, and adapters with other ranks, through the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import delta_weight, golden, golden_path
from tuner.cli.main import main
from tuner.core.adapters.files import read_adapter
from tuner.core.adapters.formats import modules_of
from tuner.core.adapters.low_rank import EXACT_SIDE, Wanted, factors_of
from tuner.plugins.flux.names import MAPS

FAMILIES = {
    "flux": "flux/dev_bfl.safetensors",
    "sd3": "sd3/sd35m_weights_f16.safetensors",
    "anima": "anima/e2e_weights.safetensors",
}
LORA = "flux/lora_sdscripts.safetensors"


def tuned_copy(name: str, path: Path, share: float = 0.1) -> dict[str, torch.Tensor]:
    """A checkpoint whose every value moved a little, biases and norms too, in float32."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        # buffers that loaders compute again are no part of a model
        key: value.float()
        if "pos_embedder" in key
        else value.float() + share * value.float().std(correction=0) * torch.randn(value.shape, generator=generator)
        for key, value in golden(name).items()
    }
    save_file(tensors, path)
    return tensors


def extracted(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, *words: str) -> dict:
    out = str(tmp_path / "adapter.safetensors")
    assert main(["extract", *words, "--model", model, "--out", out, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_products_are_those_of_the_published_extraction(tmp_path, capsys):
    stored = golden("flux/extract_svd.safetensors")
    names = [name.removeprefix("base.") for name in stored if name.startswith("base.")]
    files = []
    for which in ("base", "tuned"):
        tensors = golden(FAMILIES["flux"]) | {f"{name}.weight": stored[f"{which}.{name}"] for name in names}
        files.append(str(tmp_path / f"{which}.safetensors"))
        save_file(tensors, files[-1])
    told = extracted(tmp_path, capsys, "flux", *files, "--rank", "4")
    assert len(told["modules"]) == len(names) and told["left_out"] == []
    tensors = load_file(told["path"])
    for name in names:
        module = f"lora_unet_{name.replace('.', '_')}"
        assert float(tensors[f"{module}.alpha"]) == 4
        product = tensors[f"{module}.lora_up.weight"] @ tensors[f"{module}.lora_down.weight"]
        torch.testing.assert_close(product, stored[f"product_noclamp.{name}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("energy", [0.9, 1.0])
@pytest.mark.parametrize("model", FAMILIES)
def test_merging_what_was_extracted_gives_the_tuned_model_up_to_the_energy(tmp_path, capsys, model, energy):
    base, tuned = golden_path(FAMILIES[model]), tmp_path / "tuned.safetensors"
    wanted = tuned_copy(FAMILIES[model], tuned)
    told = extracted(tmp_path, capsys, model, str(base), str(tuned), "--energy", str(energy))
    words = ["merge", told["path"], "--base", str(base), "--model", model, "--dtype", "fp32"]
    assert main([*words, "--out", str(tmp_path / "again.safetensors")]) == 0
    again, before = load_file(tmp_path / "again.safetensors"), golden(FAMILIES[model])
    changed = [name for name in wanted if not torch.equal(again[name], before[name].float())]
    assert len(changed) == len(told["modules"])
    for name in changed:
        error, norm = (again[name] - wanted[name]).square().sum(), (wanted[name] - before[name]).square().sum()
        assert error <= (1 - energy + 1e-6) * norm
    rest = sum(float((again[name] - wanted[name]).square().sum()) for name in wanted)
    total = sum(float((wanted[name] - before[name].float()).square().sum()) for name in wanted)
    assert told["kept"] == pytest.approx(1 - rest / total, abs=1e-4)
    assert told["left_out"]


def test_layouts_and_formats_may_differ(tmp_path, capsys):
    tuned = tmp_path / "tuned.safetensors"
    words = ["merge", str(golden_path(LORA)), "--base", str(golden_path(FAMILIES["flux"])), "--model", "flux"]
    assert main([*words, "--out", str(tuned)]) == 0
    capsys.readouterr()
    base = str(golden_path("flux/dev_diffusers.safetensors"))
    told = extracted(tmp_path, capsys, "flux", base, str(tuned), "--rank", "8", "--format", "diffusers")
    assert told["kept"] == pytest.approx(1, abs=1e-4) and told["format"] == "diffusers"
    found, trained = (read_adapter(Path(each), MAPS).tensors for each in (told["path"], golden_path(LORA)))
    assert set(modules_of(found)) == set(modules_of(trained))
    for component, path in modules_of(trained):
        key = f"{component}:{path}"
        torch.testing.assert_close(delta_weight(found, key), delta_weight(trained, key), rtol=0, atol=1e-4)


def test_the_linears_that_a_format_joins_share_one_rank(tmp_path, capsys):
    base, tuned = golden_path(FAMILIES["flux"]), tmp_path / "tuned.safetensors"
    tuned_copy(FAMILIES["flux"], tuned)
    told = extracted(tmp_path, capsys, "flux", str(base), str(tuned), "--rank", "3", "--only", r".*\.to_[qkv]")
    ranks = {module["name"]: module["rank"] for module in told["modules"]}
    assert ranks == {f"lora_unet_double_blocks_{index}_img_attn_qkv": 3 for index in range(2)} | {
        f"lora_unet_single_blocks_{index}_linear1": 3 for index in range(2)
    }


@pytest.mark.parametrize(("turned", "which"), [(False, "tuned"), (True, "base")])
def test_checkpoints_of_two_models_are_not_compared(tmp_path, capsys, turned, which):
    tensors = {name: value for name, value in golden(FAMILIES["flux"]).items() if "guidance_in" not in name}
    save_file(tensors, tmp_path / "schnell.safetensors")
    files = [str(golden_path(FAMILIES["flux"])), str(tmp_path / "schnell.safetensors")]
    words = ["extract", *(files[::-1] if turned else files), "--rank", "4", "--model", "flux"]
    assert main([*words, "--out", str(tmp_path / "a.safetensors")]) == 2
    assert f"the {which} checkpoint lacks denoiser:time_text_embed.guidance" in capsys.readouterr().err


def test_checkpoints_without_a_difference_are_told(tmp_path, capsys):
    base = str(golden_path(FAMILIES["flux"]))
    words = ["extract", base, base, "--rank", "4", "--model", "flux", "--out", str(tmp_path / "a.safetensors")]
    assert main(words) == 2
    assert "do not differ where an adapter could hold it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "how much is to be kept?"),
        (("--rank", "0"), "a rank of 0 is no adapter"),
        (("--energy", "95"), "energy is a share, not 95"),
        (("--rank", "4", "--only", "nothing"), "matches no matrix"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(tmp_path, capsys, words, message):
    base = str(golden_path(FAMILIES["flux"]))
    assert main(["extract", base, base, *words, "--model", "flux", "--out", str(tmp_path / "a.safetensors")]) == 2
    assert message in capsys.readouterr().err


def test_random_projections_find_what_a_full_decomposition_finds():
    generator = torch.Generator().manual_seed(0)
    side = EXACT_SIDE + 88
    left, right = (torch.linalg.qr(torch.randn(side, side, generator=generator))[0] for _ in range(2))
    values = 0.9 ** torch.arange(side, dtype=torch.float32)
    matrix = (left * values) @ right
    found = factors_of(matrix, Wanted(rank=8))
    exact = (left[:, :8] * values[:8]) @ right[:8]
    torch.testing.assert_close(found.up @ found.down, exact, rtol=0, atol=1e-5)
    assert found.kept == pytest.approx(float((values[:8] ** 2).sum() / (values**2).sum()), rel=1e-5)
    assert torch.equal(found.up, factors_of(matrix, Wanted(rank=8)).up)
    slow = matrix + 0.02 * torch.randn(side, side, generator=generator)
    kept = factors_of(slow, Wanted(energy=0.8)).kept
    assert 0.8 <= kept < 0.82


# --- other ranks ------------------------------------------------------------------------------------------------------


def resize(tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, *words: str, model: str = "flux") -> dict:
    out = str(tmp_path / "resized.safetensors")
    assert main(["resize", source, *words, "--model", model, "--out", out, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_resized_adapter_is_the_best_of_its_rank_and_says_what_it_kept(tmp_path, capsys):
    told = resize(tmp_path, capsys, str(golden_path(LORA)), "--rank", "2")
    before, after = load_file(golden_path(LORA)), load_file(told["path"])
    assert len(told["modules"]) == len(before) // 3 and told["bytes"] < told["bytes_before"]
    for module in told["modules"]:
        name = module["name"]
        old, new = (
            tensors[f"{name}.lora_up.weight"]
            @ tensors[f"{name}.lora_down.weight"]
            * (tensors[f"{name}.alpha"] / len(tensors[f"{name}.lora_down.weight"]))
            for tensors in (before, after)
        )
        u, s, vh = torch.linalg.svd(old, full_matrices=False)
        torch.testing.assert_close(new, (u[:, :2] * s[:2]) @ vh[:2], rtol=0, atol=1e-5)
        assert module["kept"] == pytest.approx(float((s[:2] ** 2).sum() / (s**2).sum()), rel=1e-4)


@pytest.mark.parametrize("model", ["anima", "sd3"])
def test_an_energy_of_one_changes_nothing_but_the_rank(tmp_path, capsys, model):
    name = {"anima": "anima/lora_comfyui.safetensors", "sd3": "sd3/sd3m_lora_sdscripts.safetensors"}[model]
    told = resize(tmp_path, capsys, str(golden_path(name)), "--energy", "1", model=model)
    assert told["kept"] == pytest.approx(1, abs=1e-6)
    assert all(module["rank"] <= module["old_rank"] for module in told["modules"])


def test_number_format_and_metadata_are_kept(tmp_path, capsys):
    source = tmp_path / "half.safetensors"
    half = {key: value if value.ndim == 0 else value.half() for key, value in golden(LORA).items()}
    save_file(half, source, {"ss_network_dim": "16", "ss_training_comment": "mine"})
    told = resize(tmp_path, capsys, str(source), "--rank", "1")
    read = read_adapter(Path(told["path"]), MAPS)
    assert {value.dtype for name, value in read.tensors.items() if name.endswith(".up")} == {torch.float16}
    assert read.metadata["ss_training_comment"] == "mine"
    assert read.metadata["ss_network_dim"] == "1"


def test_every_module_is_listed_even_when_nothing_was_lost(tmp_path, capsys):
    out = str(tmp_path / "same.safetensors")
    words = ["resize", str(golden_path(LORA)), "--energy", "1", "--model", "flux", "--out", out]
    assert main([*words, "--layers"]) == 0
    assert capsys.readouterr().out.count("lora_unet_") == 26


@pytest.mark.parametrize("tool", ["extract", "resize"])
def test_values_that_are_no_numbers_are_named(tmp_path, capsys, tool):
    source = golden(FAMILIES["flux"] if tool == "extract" else LORA)
    name = next(name for name in source if name.endswith("img_attn.proj.weight" if tool == "extract" else "up.weight"))
    save_file(source | {name: source[name] * float("nan")}, tmp_path / "broken.safetensors")
    given = [str(golden_path(FAMILIES["flux"]))] if tool == "extract" else []
    words = [tool, *given, str(tmp_path / "broken.safetensors"), "--rank", "2", "--model", "flux"]
    assert main([*words, "--out", str(tmp_path / "new.safetensors")]) == 2
    assert "lora_unet_double_blocks_0_img_attn_proj is not finite" in capsys.readouterr().err


def test_a_pattern_that_is_none_is_told(tmp_path, capsys):
    file = str(golden_path(FAMILIES["flux"]))
    words = ["extract", file, file, "--rank", "2", "--only", "(", "--model", "flux"]
    assert main([*words, "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "'(' is no regular expression" in capsys.readouterr().err
