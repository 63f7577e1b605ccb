"""Plugins that exist only in a folder: package metadata and a module each, as an installer would leave them."""

from __future__ import annotations

import json
import struct
import textwrap
from collections.abc import Mapping
from pathlib import Path

DESCRIPTOR = """
from tuner import ModelPlugin

plugin = ModelPlugin(
    name={name!r}, api={api}, config="{module}.config:Config", files="{module}.facts:files",
    detect="{module}.facts:detect", facts="{module}.facts:facts", hooks="{module}.hooks",
    key_maps="{module}.facts:MAPS",
)
"""
CONFIG = """
from tuner import ModelConfigBase

class Config(ModelConfigBase):
    \"\"\"A toy.\"\"\"
    sharpness: float = 1.0
    \"\"\"A key of its own.\"\"\"
"""
FACTS = """
from pathlib import Path
from tuner import DtypeRules, Field, KeyFormat, KeyMaps, LoraRules, ModelFacts, NoiseDefaults, SampleDefaults

MAPS = KeyMaps(
    formats=(KeyFormat(name="plain", prefixes={{"denoiser": "net."}}, down=".down", up=".up"),), default="plain",
    paths=lambda keys: {{}},
)

def files(config):
    return {{"denoiser": (Path(config.model.path),)}}

def detect(header):
    return "small" if "{name}.weight" in header else None

def facts(config, header):
    return ModelFacts(
        family="{name}", flavour="small", components=("text", "vae", "denoiser"), trainable=("denoiser",),
        text_components=("text",), latent_channels=4, spatial_factor=8, resolution_multiple=16, block_lists=(),
        lora=LoraRules(include={{"denoiser": (".*",)}}), key_maps="{module}.facts:MAPS", dtypes=DtypeRules(),
        text_fields={{"context": Field(shape=("L", 3), of=("text",))}}, max_tokens={{}}, files={{}},
        noise=NoiseDefaults(timesteps="sigmoid", shift=1.0),
        sample=SampleDefaults(steps=2, cfg=1.0, shift=1.0, size=(64, 64), multiple=16),
    )
"""
HOOKS = """
import torch
from tuner import Models, TextEmbeds, hookimpl

@hookimpl
def load_models(components):
    return Models(
        denoiser=torch.nn.Identity(), vae=torch.nn.Identity(), text_encoders={"text": torch.nn.Identity()}
    )

@hookimpl
def encode_text(captions):
    return TextEmbeds(tensors={"context": torch.zeros(len(captions), 5, 3)})

@hookimpl
def encode_latents(pixels):
    return torch.zeros(pixels.shape[0], 4, pixels.shape[2] // 8, pixels.shape[3] // 8)

@hookimpl
def decode_latents(latents):
    return torch.zeros(latents.shape[0], 3, latents.shape[2] * 8, latents.shape[3] * 8)

@hookimpl
def predict(noisy):
    return noisy * 0

@hookimpl
def save(path):
    path.write_bytes(b"")
    return [path]
"""
EXTENSION = """
from tuner import ExtensionPlugin

plugin = ExtensionPlugin(name={name!r}, api={api}, hooks="{module}.hooks")
"""


class Site:
    """A folder on ``sys.path`` with installed plugins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(
        self, name: str, *, version: str = "0.3", api: tuple[int, int] = (1, 0), hooks: str = HOOKS, dist: str = "",
        requires: str = "", descriptor: str | None = None, module: str = "",
    ) -> None:  # fmt: skip
        """Install a model plugin."""
        module = module or f"toy_{name}"
        text = DESCRIPTOR.format(name=name, api=api, module=module) if descriptor is None else descriptor
        facts = FACTS.format(name=name, module=module)
        self._package(module, {"plugin": text, "config": CONFIG, "facts": facts, "hooks": hooks})
        self._dist(dist or f"tuner-{name}", version, f"[tuner.models]\n{name} = {module}.plugin:plugin\n", requires)

    def extension(self, name: str, hooks: str, *, api: tuple[int, int] = (1, 0)) -> None:
        """Install an extension."""
        module = f"toy_{name}"
        self._package(module, {"plugin": EXTENSION.format(name=name, api=api, module=module), "hooks": hooks})
        self._dist(f"tuner-{name}", "0.1", f"[tuner.extensions]\n{name} = {module}.plugin:plugin\n", "")

    def _package(self, module: str, files: Mapping[str, str]) -> None:
        package = self.folder / module
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text("", encoding="utf-8")
        for name, text in files.items():
            (package / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")

    def _dist(self, dist: str, version: str, entries: str, requires: str) -> None:
        info = self.folder / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {dist}", f"Version: {version}", f"Summary: The plugin {dist}"]
        lines += [f"Requires-Dist: {requires}"] if requires else []
        (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(entries, encoding="utf-8")


def write_header(path: Path, *names: str) -> Path:
    """A safetensors file with one number per name."""
    entries = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * index, 4 * index + 4]}
        for index, name in enumerate(names)
    }
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4 * len(names)))
    return path
