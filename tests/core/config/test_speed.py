"""``compile`` and ``attention``: what cannot work together is refused by name, and so is what has no effect."""

from __future__ import annotations

from typing import Any

import pytest

from tests.core.config.samples import build, minimal, toy_facts
from tuner.core.config import build_config, facts_problems
from tuner.core.errors import UsageError

COMPILED = {"enabled": True}
PROMPTS = {"sample": {"prompts": ["a dog"]}}
BF16 = {"precision": {"compute": "bf16"}}


def refused(sections: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        build_config(minimal(**sections))
    return str(caught.value)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"compile": {"mode": "max-autotune-no-cudagraphs"}}, "while compile.enabled is off"),
        ({"compile": COMPILED | {"backend": "eager", "mode": "max-autotune-no-cudagraphs"}}, "with backend 'eager'"),
        ({"compile": COMPILED | {"mode": "reduce-overhead"}}, "compile.mode"),
        ({"compile": COMPILED, "memory": {"checkpointing": "selective"}}, "'selective' does not work with compile"),
        ({"compile": COMPILED, "memory": {"checkpointing": "keep_attention"}}, "does not work with compile"),
        ({"compile": COMPILED, "attention": {"backend": "flash"}}, "'flash' does not work with compile"),
        ({"compile": COMPILED, "attention": {"sample_backend": "sage"}, **PROMPTS}, "'sage' does not work with"),
        ({"attention": {"backend": "sage"}}, "no gradient"),
        ({"attention": {"backend": "flex"}}, "compiled by itself"),
        ({"attention": {"backend": "sageattn"}}, "use 'sage'"),
        ({"attention": {"backend": "flash"}, "precision": {"compute": "fp32"}}, "cannot compute in float32"),
        ({"attention": {"sample_backend": "math"}}, "without sample.prompts"),
        ({"attention": {"sample_backend": "math", "backend": "math"}, **PROMPTS}, "attention.backend as well"),
        ({"attention": {"backend": "math"}, "memory": {"checkpointing": "keep_attention"}}, "'math' is none of them"),
        ({"attention": {"fuse_qkv": False}, "quantize": {"denoiser": "int8"}}, "multiplied one by one"),
    ],
)
def test_a_combination_that_cannot_work_is_refused(sections: dict[str, Any], expected: str) -> None:
    assert expected in refused(sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"compile": COMPILED, "memory": {"checkpointing": "block"}, "attention": {"backend": "cudnn"}},
        {"attention": {"backend": "flash", "sample_backend": "sage", "split": True}, **PROMPTS},
        {"compile": COMPILED | {"dynamic": "off"}, "attention": {"fuse_qkv": False}},
    ],
)
def test_what_works_together_is_accepted(sections: dict[str, Any]) -> None:
    build(**BF16, **sections)


@pytest.mark.parametrize(
    ("kernel", "allowed"), [("cudnn", True), ("sdpa", True), ("flash", False), ("xformers", False)]
)
def test_a_model_that_hides_keys_gets_kernels_that_can(kernel: str, allowed: bool) -> None:
    found = facts_problems(build(**BF16, attention={"backend": kernel}), toy_facts(hides_keys=True))
    assert [str(each).splitlines()[0] for each in found] == (
        [] if allowed else [f"attention.backend: '{kernel}' cannot hide tokens, which this model does with padding"]
    )
    assert facts_problems(build(**BF16, attention={"backend": kernel}), toy_facts()) == []
