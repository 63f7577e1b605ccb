"""Kernels by name: each is called the way its package documents, and refused where it cannot work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.core.compute import attention_kernels
from tuner.core.compute.attention import attending, attention
from tuner.core.compute.attention_kernels import check_attention
from tuner.core.errors import UsageError

GPU = torch.device("cuda")
CPU = torch.device("cpu")


def heads(tokens: int, seed: int) -> Tensor:
    return torch.randn(2, 3, tokens, 8, generator=torch.Generator().manual_seed(seed))


def by_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The layout of flash-attn and xformers: [B, L, H, d]."""
    assert q.shape == (2, 5, 3, 8) and k.shape == v.shape == (2, 7, 3, 8)
    return F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v))).transpose(1, 2)


def flash(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    return by_tokens(q, k, v)


def flash_with_sums(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    return by_tokens(q, k, v), torch.zeros(2, 3, 5)


def xformers(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0) -> Tensor:
    return by_tokens(query, key, value)


def sage(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False) -> Tensor:
    assert tensor_layout == "HND" and not is_causal and q.shape == (2, 3, 5, 8)
    return F.scaled_dot_product_attention(q, k, v)


FAKES: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "flash": ("flash_attn", "flash_attn_func", flash),
    "flash3": ("flash_attn_interface", "flash_attn_func", flash_with_sums),
    "xformers": ("xformers.ops", "memory_efficient_attention", xformers),
    "sage": ("sageattention", "sageattn", sage),
}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules with the packages' names and signatures, which compute by torch."""
    for module, name, function in FAKES.values():
        fake = ModuleType(module)
        setattr(fake, name, function)
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ["sdpa_flash", "math", *FAKES])
def test_every_kernel_computes_attention(name: str, split: bool, packages: None, monkeypatch: Any) -> None:
    q, k, v = heads(5, 1), heads(7, 2), heads(7, 3)
    expected = F.scaled_dot_product_attention(q, k, v)
    if split and name in FAKES:
        monkeypatch.setattr(sys.modules[__name__], "by_tokens", by_tokens_of_one)
        monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sage_of_one))
    torch.testing.assert_close(attention(q, k, v, backend=name, split=split), expected)


def by_tokens_of_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    assert q.shape[0] == 1
    return F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v))).transpose(1, 2)


def sage_of_one(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str, is_causal: bool) -> Tensor:
    assert q.shape[0] == 1
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("name", FAKES)
def test_a_mask_never_gets_lost(name: str, packages: None) -> None:
    with pytest.raises(UsageError, match="cannot hide tokens"):
        attention(heads(5, 1), heads(7, 2), heads(7, 3), bias=torch.zeros(7), backend=name)


def test_a_kernel_without_a_gradient_is_not_trained_through(packages: None) -> None:
    q, k, v = heads(5, 1).requires_grad_(), heads(7, 2), heads(7, 3)
    with pytest.raises(UsageError, match="no gradient"):
        attention(q, k, v, backend="sage")
    with torch.no_grad():
        attention(q, k, v, backend="sage")


def test_samples_may_use_another_kernel_than_the_one_that_callers_name(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    plain = attention_kernels.run_kernel

    def recorded(name: str, *arguments: Any) -> Tensor:
        used.append(name)
        return plain(name, *arguments)

    monkeypatch.setattr("tuner.core.compute.attention.run_kernel", recorded)
    q = heads(5, 1)
    with attending("math"), attending(None):
        attention(q, q, q)
    attention(q, q, q)
    assert used == ["math", "sdpa"]


def test_torchs_kernels_are_part_of_a_graph() -> None:
    torch.compiler.reset()
    q, k, v = heads(5, 1).requires_grad_(), heads(7, 2), heads(7, 3)
    compiled = torch.compile(lambda *each: attention(*each, backend="math"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))


# --- refusals before anything is loaded -------------------------------------------------------------------------------


def asked(backend: str = "sdpa", sample: str | None = None, compute: str = "bf16") -> Any:
    return SimpleNamespace(
        attention=SimpleNamespace(backend=backend, sample_backend=sample), precision=SimpleNamespace(compute=compute)
    )


def model(hides_keys: bool = False) -> Any:
    return SimpleNamespace(hides_keys=hides_keys)


@pytest.mark.parametrize("name", ["efficient", "cudnn", *FAKES])
def test_kernels_of_gpus_are_refused_elsewhere(name: str) -> None:
    with pytest.raises(UsageError, match="NVIDIA") as caught:
        check_attention(asked(sample=name), model(), CPU)
    assert caught.value.where == "attention.sample_backend"


@pytest.mark.parametrize("name", FAKES)
def test_a_missing_package_says_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "find_spec", lambda module: None)
    with pytest.raises(UsageError, match="not installed") as caught:
        check_attention(asked(backend=name), model(), GPU)
    assert "install" in str(caught.value.fix) or "build" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("wanted", "facts", "told"),
    [
        (asked("sdpa_flash", compute="fp32"), model(), "float32"),
        (asked("sdpa_flash"), model(hides_keys=True), "hide tokens"),
        (asked("flash3"), model(), "compute capability 9.x"),
        (asked("cudnn"), model(hides_keys=True), None),
        (asked("flash"), model(), None),
    ],
)
def test_a_gpu_that_cannot_do_it_is_told(wanted: Any, facts: Any, told: str | None, monkeypatch: Any) -> None:
    monkeypatch.setattr(attention_kernels, "find_spec", lambda module: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    if told is None:
        check_attention(wanted, facts, GPU)
        return
    with pytest.raises(UsageError, match=told):
        check_attention(wanted, facts, GPU)
