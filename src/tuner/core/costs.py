"""What a plugin declares about the price of its model, so that runs can be planned before any weight is read. No torch.

"Values" are numbers of the compute dtype. Amounts per token are given for the tokens of the image and for the rows of
text apart, because an image brings more or fewer of them with its size while the text stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Reads = Literal["image", "text", "both", "vector"]
"""What goes through a module: tokens of the image, rows of text, both as one sequence, or one vector per sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A linear, or a convolution that acts like one: the size of its weight, and what it reads."""

    rows: int
    columns: int
    reads: Reads = "image"

    @property
    def size(self) -> int:
        """Values of the weight."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Rate:
    """An amount per token of the image and per row of text, for one sample."""

    image: float
    text: float

    def of(self, image: float, text: float) -> float:
        return self.image * image + self.text * text


@dataclass(frozen=True, slots=True, kw_only=True)
class Attend:
    """One attention of a block: who asks, who is asked, and the width of all heads together."""

    queries: Reads
    keys: Reads
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelCost:
    """A block under one recompute level.

    kept: values that autograd keeps of it until its backward pass. work: values that exist beside what is kept while
    one such block runs backward, what it recomputes included. moved: values that the elementwise operations and the
    adapters of a training step read and write.
    """

    kept: Rate
    work: Rate
    moved: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """``count`` equal blocks in a row of the block list ``path``, the first of them being number ``first`` there.

    layers: by path inside the block. other: values of parameters that are no layer's weight. levels: by value of
    ``memory.checkpointing``.
    """

    path: str
    first: int
    count: int
    layers: Mapping[str, Layer]
    other: int
    attention: tuple[Attend, ...]
    levels: Mapping[str, LevelCost]

    @property
    def parameters(self) -> int:
        """Values of one block."""
        return sum(layer.size for layer in self.layers.values()) + self.other


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCost:
    """A component beside the denoiser.

    parameters: values in all. layers: linears by path, which quantization and adapters may touch. work: values that
    exist at the peak of one call, per token of text or per pixel; decode_work the same for making pixels. operations:
    floating-point operations per token or pixel; decode_operations for making pixels.
    """

    parameters: int
    layers: Mapping[str, Layer] = field(default_factory=dict)
    work: float = 0
    decode_work: float = 0
    operations: float = 0
    decode_operations: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRules:
    """What a model costs. ``ModelFacts.costs`` holds it; a model without it has no plan.

    blocks: all blocks of the denoiser in the order in which they run. outer: its layers outside of the blocks, by path;
    outer_other: values of its other parameters there. token: pixels along the side of one token. text_rows: rows of
    text that a sample brings to the blocks. parts: the other components by name. joined: values of matrices that are
    put beside each other after loading; a C library keeps the memory of the parts, so a process on a CPU stays larger.
    """

    blocks: tuple[BlockCost, ...]
    outer: Mapping[str, Layer]
    outer_other: int
    token: int
    text_rows: int
    parts: Mapping[str, PartCost]
    joined: int = 0

    @property
    def parameters(self) -> int:
        """Values of the denoiser."""
        inside = sum(block.count * block.parameters for block in self.blocks)
        return inside + sum(layer.size for layer in self.outer.values()) + self.outer_other

    def layers(self) -> dict[str, Layer]:
        """Every layer of the denoiser by its whole path, in order."""
        found = dict(self.outer)
        for block in self.blocks:
            for number in range(block.first, block.first + block.count):
                found |= {f"{block.path}.{number}.{name}": layer for name, layer in block.layers.items()}
        return found
