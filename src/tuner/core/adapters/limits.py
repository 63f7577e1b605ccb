"""A limit on how much each low-rank adapter may change its module."""

from __future__ import annotations

import torch
from torch import Tensor

from tuner.core.adapters.layers import LoraLayer
from tuner.core.adapters.lora import AdapterNetwork
from tuner.core.types import Network


@torch.no_grad()
def limit_norms(network: Network, limit: float) -> dict[str, float]:
    """Scale down every layer whose update has a Frobenius norm above ``limit``, both matrices alike.

    Rule of kohya-ss/sd-scripts' ``scale_weight_norms``. The update itself is never built: its squared norm is the sum
    over (up^T up) * (down down^T), matrices of the rank. Returns ``adapter_norm_max`` and ``adapter_norm_mean`` as they
    are afterwards, and ``adapters_limited``, how many were scaled.
    """
    module = network.module
    assert isinstance(module, AdapterNetwork)
    layers = [layer for _, layer in module.items() if isinstance(layer, LoraLayer)]
    norms = torch.stack([update_norm(layer) for layer in layers])
    ratios = (limit / norms.clamp(min=1e-30)).clamp(max=1.0)
    for layer, ratio in zip(layers, ratios.sqrt().unbind(), strict=True):
        for parameter in (layer.down, layer.up):
            parameter.mul_(ratio.to(parameter.device, parameter.dtype))
    after = norms * ratios
    return {
        "adapter_norm_max": float(after.max()),
        "adapter_norm_mean": float(after.mean()),
        "adapters_limited": float((ratios < 1).sum()),
    }


def update_norm(layer: LoraLayer) -> Tensor:
    """Frobenius norm of alpha / rank * up down, a float32 scalar."""
    down, up = layer.down.detach().flatten(1).float(), layer.up.detach().flatten(1).float()
    squared = ((up.t() @ up) * (down @ down.t())).sum().clamp(min=0)
    return squared.sqrt() * (layer.alpha / down.shape[0])
