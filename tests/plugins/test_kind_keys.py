"""Names of every kind of adapter in the files of each family, as LyCORIS, ComfyUI, PEFT and sd-scripts spell them."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from tuner.core.adapters.deltas import merged_weight
from tuner.core.adapters.formats import decode_adapter, encode_adapter, modules_of, parts_of
from tuner.core.adapters.kinds import checked_parts
from tuner.core.errors import UsageError
from tuner.core.types import KeyMaps

WIDTH = 4


def parts(kind: str, rows: int = WIDTH, width: int = WIDTH, constraint: float = 0.0) -> dict[str, Tensor]:
    """Parts of one linear [rows, width] with values of their own."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "lora": {"down": (2, width), "up": (rows, 2)},
        "dora": {"down": (2, width), "up": (rows, 2), "dora_scale": (rows, 1)},
        "loha": {"hada_w1_a": (rows, 2), "hada_w1_b": (2, width), "hada_w2_a": (rows, 2), "hada_w2_b": (2, width)},
        "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (rows // 2, 1), "lokr_w2_b": (1, width // 2)},
        "oft": {"oft_blocks": (2, rows // 2, rows // 2)},
        "boft": {"oft_blocks": (2, 2, rows // 2, rows // 2)},
        "ia3": {"weight": (rows,)},
        "full": {"diff": (rows, width), "diff_b": (rows,)},
        "norms": {"w_norm": (width,)},
    }
    generator = torch.Generator().manual_seed(rows)
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes[kind].items()}
    alphas = {"lora": 2.0, "dora": 2.0, "loha": 2.0, "lokr": 1.0, "oft": constraint, "boft": constraint}
    if kind in alphas:
        found["alpha"] = torch.tensor(alphas[kind])
    if kind == "ia3":
        found["on_input"] = torch.tensor(0.0)
    return found


def maps(family: str) -> KeyMaps:
    return importlib.import_module(f"tuner.plugins.{family}.names").MAPS


def network(kind: str, paths: dict[str, int], constraint: float = 0.0) -> dict[str, Tensor]:
    return {
        f"denoiser:{path}.{part}": value
        for path, rows in paths.items()
        for part, value in parts(kind, rows * WIDTH, constraint=constraint).items()
    }


LOHA = (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".alpha")
LOKR = (".lokr_w1", ".lokr_w2_a", ".lokr_w2_b", ".alpha")
DORA = (".dora_scale", ".lora_down.weight", ".lora_up.weight", ".alpha")
PEFT_DORA = (".lora_magnitude_vector", ".lora_A.weight", ".lora_B.weight")
OFT = (".oft_blocks", ".alpha")
IA3 = (".weight", ".on_input")
FULL = (".diff", ".diff_b")

ANIMA = "blocks.0.mlp.layer1"
TO_Q = "transformer_blocks.0.attn.to_q"
CASES = [
    ("anima", "comfyui", "loha", ANIMA, "diffusion_model.blocks.0.mlp.layer1", LOHA),
    ("anima", "comfyui", "lokr", ANIMA, "diffusion_model.blocks.0.mlp.layer1", LOKR),
    ("anima", "comfyui", "oft", ANIMA, "diffusion_model.blocks.0.mlp.layer1", OFT),
    ("anima", "comfyui", "boft", ANIMA, "diffusion_model.blocks.0.mlp.layer1", OFT),
    ("anima", "comfyui", "full", ANIMA, "diffusion_model.blocks.0.mlp.layer1", FULL),
    (
        "anima",
        "comfyui",
        "dora",
        ANIMA,
        "diffusion_model.blocks.0.mlp.layer1",
        (".dora_scale", ".lora_A.weight", ".lora_B.weight"),
    ),
    (
        "anima",
        "comfyui",
        "norms",
        "blocks.0.self_attn.q_norm",
        "diffusion_model.blocks.0.self_attn.q_norm",
        (".w_norm",),
    ),
    ("anima", "sd-scripts", "lokr", ANIMA, "lora_unet_blocks_0_mlp_layer1", LOKR),
    ("anima", "sd-scripts", "dora", ANIMA, "lora_unet_blocks_0_mlp_layer1", DORA),
    ("anima", "sd-scripts", "ia3", ANIMA, "lora_unet_blocks_0_mlp_layer1", IA3),
    ("anima", "diffusers", "dora", ANIMA, "transformer.transformer_blocks.0.ff.net.0.proj", PEFT_DORA),
    ("flux", "lycoris", "lokr", TO_Q, "lycoris_transformer_blocks_0_attn_to_q", LOKR),
    ("flux", "lycoris", "loha", TO_Q, "lycoris_transformer_blocks_0_attn_to_q", LOHA),
    (
        "flux",
        "lycoris",
        "norms",
        "transformer_blocks.0.attn.norm_q",
        "lycoris_transformer_blocks_0_attn_norm_q",
        (".w_norm",),
    ),
    ("flux", "diffusers", "dora", TO_Q, f"transformer.{TO_Q}", PEFT_DORA),
    ("flux", "sd-scripts", "dora", "transformer_blocks.0.ff.net.2", "lora_unet_double_blocks_0_img_mlp_2", DORA),
    ("sd3", "lycoris", "boft", TO_Q, "lycoris_transformer_blocks_0_attn_to_q", OFT),
    ("sd3", "lycoris", "ia3", TO_Q, "lycoris_transformer_blocks_0_attn_to_q", IA3),
    ("sd3", "diffusers", "dora", TO_Q, f"transformer.{TO_Q}", PEFT_DORA),
    ("sd3", "comfyui", "full", "transformer_blocks.0.ff.net.2", "diffusion_model.joint_blocks.0.x_block.mlp.fc2", FULL),
]


@pytest.mark.parametrize(("family", "name", "kind", "path", "module", "suffixes"), CASES)
def test_a_kind_is_spelled_as_its_readers_expect_and_comes_back(
    family: str, name: str, kind: str, path: str, module: str, suffixes: tuple[str, ...]
) -> None:
    known = maps(family)
    fmt = known.format(name)
    assert fmt is not None
    tensors = network(kind, {path: 1})
    written = encode_adapter(tensors, fmt)
    assert set(written) == {f"{module}{suffix}" for suffix in suffixes}
    read, found = decode_adapter(written, known.formats, known.paths(tuple(written)))
    assert found == name or known.format(found).prefixes["denoiser"] == fmt.prefixes["denoiser"]
    for key, value in tensors.items():
        torch.testing.assert_close(read[key], value, msg=key)


QKV = {f"transformer_blocks.0.attn.to_{name}": 1 for name in "qkv"}
LINEAR1 = {f"single_transformer_blocks.0.attn.to_{name}": 1 for name in "qkv"} | {
    "single_transformer_blocks.0.proj_mlp": 4
}


@pytest.mark.parametrize(
    ("family", "module"), [("flux", "double_blocks_0_img_attn_qkv"), ("sd3", "joint_blocks_0_x_block_attn_qkv")]
)
@pytest.mark.parametrize("kind", ["dora", "full"])
def test_separate_projections_are_joined_by_rows_and_cut_again(family: str, module: str, kind: str) -> None:
    known, tensors = maps(family), network(kind, QKV)
    # Values that differ, so that a wrong order shows.
    tensors = {name: value if value.ndim == 0 else value + index for index, (name, value) in enumerate(tensors.items())}
    written = encode_adapter(tensors, known.formats[0])
    assert {name.partition(".")[0] for name in written} == {f"lora_unet_{module}"}
    read, _ = decode_adapter(written, known.formats, known.paths(tuple(written)))
    for path in QKV:
        own, back = parts_of(tensors, "denoiser", path), parts_of(read, "denoiser", path)
        if kind == "dora":
            assert torch.equal(back["dora_scale"], own["dora_scale"])
            torch.testing.assert_close(
                back["up"] @ back["down"] * back["alpha"] / len(back["down"]),
                own["up"] @ own["down"] * own["alpha"] / 2,
            )
        else:
            assert back.keys() == own.keys() and all(torch.equal(back[part], own[part]) for part in own)


def test_lengths_of_projections_that_are_not_adapted_cannot_be_stored() -> None:
    known, tensors = maps("flux"), network("dora", {TO_Q: 1})
    with pytest.raises(UsageError, match="cannot be stored as one"):
        encode_adapter(tensors, known.formats[0])


def test_rotations_of_joint_projections_are_numbered_for_sd_scripts() -> None:
    known = maps("flux")
    fmt = known.format("sd-scripts-oft")
    assert fmt is not None
    tensors = network("oft", {**LINEAR1, "transformer_blocks.0.ff.net.2": 1}, constraint=0.02)
    written = encode_adapter(tensors, fmt)
    assert set(written) == {
        *(f"oft_unet_single_blocks_0_linear1.oft_blocks.{index}" for index in range(4)),
        "oft_unet_single_blocks_0_linear1.alpha",
        "oft_unet_double_blocks_0_img_mlp_2.oft_blocks.0",
        "oft_unet_double_blocks_0_img_mlp_2.alpha",
    }
    read, name = decode_adapter(written, known.formats, known.paths(tuple(written)))
    assert name == "sd-scripts-oft"
    assert read.keys() == tensors.keys() and all(torch.equal(read[key], value) for key, value in tensors.items())


def test_a_limit_is_applied_to_the_blocks_where_programs_read_it_differently() -> None:
    known = maps("anima")
    written = encode_adapter(network("oft", {ANIMA: 1}, constraint=0.01), known.formats[0])
    blocks = written[f"diffusion_model.{ANIMA}.oft_blocks"]
    norm = (blocks - blocks.transpose(1, 2)).norm()
    torch.testing.assert_close(norm, torch.tensor(0.01 * WIDTH))
    assert float(written[f"diffusion_model.{ANIMA}.alpha"]) == 0.0


@pytest.mark.parametrize("kind", ["loha", "lokr", "boft", "ia3"])
def test_joint_matrices_hold_no_kind_without_a_joint_form(kind: str) -> None:
    known = maps("flux")
    for fmt in known.formats:
        if fmt.fused:
            assert kind not in fmt.kinds
            with pytest.raises(UsageError, match=r"cannot (hold|be stored)"):
                encode_adapter(network(kind, QKV), fmt)


@pytest.mark.parametrize(
    ("module", "paths"),
    [("double_blocks_0_img_attn_qkv", QKV), ("single_blocks_0_linear1", LINEAR1)],
    ids=["three parts", "one of them wider"],
)
@pytest.mark.parametrize("kind", ["loha", "lokr", "full lokr", "odd lokr", "oft", "ia3", "ia3 on inputs"])
def test_adapters_of_a_joint_matrix_act_on_its_projections(kind: str, module: str, paths: dict[str, int]) -> None:
    """LyCORIS under sd-scripts trains one adapter of any kind for the whole joint matrix."""
    rows = sum(paths.values()) * WIDTH
    found = parts("lokr" if "lokr" in kind else kind.split()[0], rows, constraint=0.01)
    if kind == "full lokr":
        found = {"lokr_w1": torch.randn(sum(paths.values()), 2), "lokr_w2": torch.randn(WIDTH, 2)}
    if kind == "odd lokr":
        found = {"lokr_w1": torch.randn(2, 2), "lokr_w2_a": torch.randn(rows // 2, 1), "lokr_w2_b": torch.randn(1, 2)}
    if kind == "oft":
        found["oft_blocks"] = torch.randn(rows // 2, 2, 2)
    if kind == "ia3 on inputs":
        found = {"weight": torch.randn(WIDTH), "on_input": torch.tensor(1.0)}
    weight = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))
    wanted = merged_weight(weight, checked_parts(found, module))

    known = maps("flux")
    stored = {f"lora_unet_{module}.{part}": value for part, value in found.items()}
    read, _ = decode_adapter(stored, known.formats, known.paths(tuple(stored)))
    split = torch.split(weight, [count * WIDTH for count in paths.values()])
    merged = [merged_weight(part, parts_of(read, "denoiser", path)) for path, part in zip(paths, split, strict=True)]
    torch.testing.assert_close(torch.cat(merged), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize("factor", [1, 2])
def test_a_kronecker_product_follows_halves_that_stand_in_the_other_order(rows: int, factor: int) -> None:
    found = {"lokr_w1": torch.randn(factor, 2), "lokr_w2": torch.randn(rows * WIDTH // factor, WIDTH // 2)}
    known, module = maps("sd3"), "joint_blocks_0_context_block_adaLN_modulation_1"
    stored = {f"lora_unet_{module}.{part}": value for part, value in found.items()}
    read, _ = decode_adapter(stored, known.formats, known.paths(tuple(stored)))
    [(component, path)] = modules_of(read)
    change = merged_weight(torch.zeros(rows * WIDTH, WIDTH), parts_of(read, component, path))
    wanted = torch.kron(found["lokr_w1"], found["lokr_w2"])
    # Six vectors are in the same order in both layouts, two are not.
    torch.testing.assert_close(change, torch.cat(wanted.chunk(2)[::-1]) if rows == 2 else wanted)
