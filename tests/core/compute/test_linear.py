"""`project` equals the plain formula in value and gradient: fused, adapted, frozen, compiled or recomputed."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tuner.core.compute.linear import adapted_forward, project, share_storage


class Adapter:
    """The least that `project` asks for."""

    def __init__(self, down: Tensor, up: Tensor, scale: float, mask: Tensor | None = None) -> None:
        self.down, self.up, self.scale, self.mask = down, up, scale, mask

    def mid_mask(self, x: Tensor) -> Tensor | None:
        return self.mask


def linears_of(
    sizes: tuple[int, ...], ranks: tuple[int | None, ...], *, bias: bool = False, dtype: torch.dtype = torch.float64
) -> list[nn.Linear]:
    generator = torch.Generator().manual_seed(5)
    linears = []
    for index, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
        linear = nn.Linear(6, size, bias=bias, dtype=dtype)
        for parameter in linear.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
        linear.requires_grad_(False)
        if rank is not None:
            master = torch.float64 if dtype == torch.float64 else torch.float32
            down = torch.randn(rank, 6, generator=generator, dtype=torch.float64).to(master).requires_grad_()
            up = torch.randn(size, rank, generator=generator, dtype=torch.float64).to(master).requires_grad_()
            linear.__dict__["adapter"] = Adapter(down, up, 0.5 + index)
        linears.append(linear)
    return linears


def plain(x: Tensor, linear: nn.Linear) -> Tensor:
    y = x @ linear.weight.t()
    if linear.bias is not None:
        y = y + linear.bias
    adapter = getattr(linear, "adapter", None)
    if adapter is None:
        return y
    mid = x @ adapter.down.to(x.dtype).t()
    if adapter.mask is not None:
        mid = mid * adapter.mask
    return y + adapter.scale * (mid @ adapter.up.to(x.dtype).t())


def adapter_tensors(linears: list[nn.Linear]) -> list[Tensor]:
    adapters = [linear.adapter for linear in linears if hasattr(linear, "adapter")]
    return [tensor for adapter in adapters for tensor in (adapter.down, adapter.up)]


def some_x(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)


CASES = [((4,), (2,)), ((4, 5, 3), (2, 3, 1)), ((4, 5, 3), (2, None, 1)), ((4, 5), (None, None))]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("sizes", "ranks"), CASES)
@pytest.mark.parametrize("shape", [(7,), (2, 3), (2, 1, 2, 3)])
def test_values_and_gradients_equal_the_plain_formula(
    shape: tuple[int, ...], sizes: tuple[int, ...], ranks: tuple[int | None, ...], bias: bool, shared: bool
) -> None:
    linears = linears_of(sizes, ranks, bias=bias)
    if shared:
        share_storage(linears)
    x = some_x(*shape).requires_grad_()
    inputs = [x, *adapter_tensors(linears)]
    outs, expected = project(x, linears), [plain(x, linear) for linear in linears]
    for out, want in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, want)
    probes = [torch.randn_like(want) for want in expected]
    grads = torch.autograd.grad(outs, inputs, probes)
    for grad, want in zip(grads, torch.autograd.grad(expected, inputs, probes), strict=True):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_adapters_with_one_down_for_several_linears_equal_the_plain_formula(masked: bool, shared: bool) -> None:
    linears = linears_of((4, 5, 3), (2, 2, 1), bias=True)
    linears[1].adapter.down = linears[0].adapter.down
    if masked:
        linears[0].adapter.mask = linears[1].adapter.mask = torch.tensor([[[0.0]], [[1.25]]], dtype=torch.float64)
    if shared:
        share_storage(linears)
    x = some_x(2, 3).requires_grad_()
    inputs = [x, linears[0].adapter.down, linears[2].adapter.down, *(linear.adapter.up for linear in linears)]
    outs, expected = project(x, linears), [plain(x, linear) for linear in linears]
    probes = [torch.randn_like(want) for want in expected]
    torch.testing.assert_close(outs, tuple(expected))
    wanted = torch.autograd.grad(expected, inputs, probes)
    torch.testing.assert_close(torch.autograd.grad(outs, inputs, probes), wanted)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_agree_with_numeric_ones(shared: bool) -> None:
    linears = linears_of((4, 3), (2, 1), bias=True)
    linears[1].adapter.mask = torch.tensor([[[0.0]], [[1.25]]], dtype=torch.float64)
    if shared:
        share_storage(linears)
    adapters = [linear.adapter for linear in linears]

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        for adapter, down, up in zip(adapters, tensors[::2], tensors[1::2], strict=True):
            adapter.down, adapter.up = down, up
        return project(x, linears)

    assert torch.autograd.gradcheck(run, (some_x(2, 3).requires_grad_(), *adapter_tensors(linears)))


@pytest.mark.parametrize("shared", [False, True])
def test_an_unused_output_costs_its_adapter_only_a_zero_gradient(shared: bool) -> None:
    linears = linears_of((4, 5, 3), (2, 3, 1))
    if shared:
        share_storage(linears)
    x = some_x(5).requires_grad_()
    first, _, third = project(x, linears)
    expected = plain(x, linears[0]).sum() + plain(x, linears[2]).sum()
    inputs = [x, *adapter_tensors(linears)]
    grads = torch.autograd.grad(first.sum() + third.sum(), inputs)
    for grad, want in zip(grads, torch.autograd.grad(expected, inputs, materialize_grads=True), strict=True):
        torch.testing.assert_close(grad, want)


def test_scale_zero_is_exactly_the_base() -> None:
    linears = linears_of((4, 5), (2, 3), dtype=torch.float32)
    x = some_x(5, dtype=torch.float32)
    for linear in linears:
        linear.adapter.scale = 0.0
    for out, linear in zip(project(x, linears), linears, strict=True):
        assert torch.equal(out, nn.functional.linear(x, linear.weight))


def test_a_trainable_base_gets_its_weight_gradients() -> None:
    linears = linears_of((4, 3), (2, None), bias=True)
    linears[0].requires_grad_(True)
    x = some_x(2, 5).requires_grad_()
    inputs = [x, linears[0].weight, linears[0].bias, *adapter_tensors(linears)]
    got = torch.autograd.grad(sum(out.square().sum() for out in project(x, linears)), inputs)
    want = torch.autograd.grad(sum(plain(x, linear).square().sum() for linear in linears), inputs)
    for grad, expected in zip(got, want, strict=True):
        torch.testing.assert_close(grad, expected)


def test_a_replaced_base_product_keeps_its_adapter() -> None:
    (linear,) = linears_of((4,), (2,))
    want = plain(some_x(3), linear) + 1
    linear.__dict__["base_forward"] = lambda x: x @ linear.weight.t() + 1
    torch.testing.assert_close(project(some_x(3), [linear])[0], want)


class Packed(nn.Linear):
    """A linear whose product does not come from its weight as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.neg())


def test_a_subclass_computes_its_own_product() -> None:
    packed = Packed(6, 4, bias=False, dtype=torch.float64).requires_grad_(False)
    (linear,) = linears_of((4,), (2,))
    first, second = project(some_x(3), [packed, linear])
    torch.testing.assert_close(first, -some_x(3) @ packed.weight.t())
    torch.testing.assert_close(second, plain(some_x(3), linear))


def test_bfloat16_activations_give_float32_adapter_gradients() -> None:
    linears = linears_of((4, 5), (2, 3), dtype=torch.bfloat16)
    x = some_x(64, dtype=torch.bfloat16).requires_grad_()
    outs = project(x, linears)
    assert all(out.dtype == torch.bfloat16 for out in outs)
    torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    wide = linears_of((4, 5), (2, 3))
    expected = [plain(some_x(64), linear) for linear in wide]
    torch.autograd.backward(expected, [torch.ones_like(out) for out in expected])
    for tensor, want in zip(adapter_tensors(linears), adapter_tensors(wide), strict=True):
        assert tensor.grad.dtype == torch.float32
        assert (tensor.grad.double() - want.grad).norm() < 0.02 * want.grad.norm()


def test_only_x_and_the_rank_activations_are_saved() -> None:
    linears = linears_of((64, 64, 64), (2, 2, 2), dtype=torch.float32)
    share_storage(linears)
    known = {linear.weight.untyped_storage().data_ptr() for linear in linears}
    known |= {tensor.untyped_storage().data_ptr() for tensor in adapter_tensors(linears)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = some_x(100, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outs = project(x, linears)
    assert sum(saved.values()) == x.untyped_storage().nbytes() + 100 * 6 * 4
    nodes = {out.grad_fn for out in outs}
    assert len(nodes) == 1


def test_shared_storage_keeps_names_values_and_identity() -> None:
    linears = linears_of((4, 5), (None, None), bias=True)
    before = [(linear.weight, linear.weight.clone()) for linear in linears]
    share_storage(linears)
    for linear, (parameter, value) in zip(linears, before, strict=True):
        assert linear.weight is parameter
        assert torch.equal(linear.weight, value)
        assert set(linear.state_dict()) == {"weight", "bias"}
    assert linears[0].weight.untyped_storage().data_ptr() == linears[1].weight.untyped_storage().data_ptr()


def test_a_run_of_a_group_and_any_other_order_give_the_same() -> None:
    linears = linears_of((4, 5, 3), (None, 2, 1), bias=True)
    share_storage(linears)
    x = some_x(3)
    for chosen in (linears[1:], linears[:2], linears[::-1], [linears[0], linears[2]]):
        for out, linear in zip(project(x, chosen), chosen, strict=True):
            torch.testing.assert_close(out, plain(x, linear))


def test_a_shared_model_can_move_be_copied_loaded_and_reassigned() -> None:
    model = nn.ModuleList(linears_of((4, 5), (None, None)))
    share_storage(list(model))
    x = some_x(3)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied[0].weight.zero_()
    assert torch.equal(project(x, list(copied))[0], torch.zeros(3, 4, dtype=torch.float64))
    assert project(x, list(model))[0].abs().min() > 0
    model.float()
    assert model[0].weight.untyped_storage().data_ptr() == model[1].weight.untyped_storage().data_ptr()
    torch.testing.assert_close(project(x.float(), list(model))[1], plain(x.float(), model[1]))
    model.load_state_dict({name: torch.ones_like(value) for name, value in model.state_dict().items()}, assign=True)
    torch.testing.assert_close(project(x.float(), list(model))[0], plain(x.float(), model[0]))


def test_unequal_linears_cannot_share() -> None:
    with pytest.raises(ValueError, match="input size"):
        share_storage([nn.Linear(6, 4), nn.Linear(5, 4)])
    with pytest.raises(ValueError, match="dtype"):
        share_storage([nn.Linear(6, 4), nn.Linear(6, 4, dtype=torch.float64)])


class Block(nn.Module):
    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.q, self.k = linears_of((6, 6), (2, 3), dtype=torch.float32)
        self.out = linears_of((6,), (2,), dtype=torch.float32)[0]
        self.out.forward = MethodType(adapted_forward, self.out)
        if shared:
            share_storage([self.q, self.k])

    def forward(self, x: Tensor) -> Tensor:
        q, k = project(x, (self.q, self.k))
        return self.out(torch.tanh(q) * k)

    def masters(self) -> list[Tensor]:
        return adapter_tensors([self.q, self.k, self.out])


@pytest.mark.parametrize("shared", [False, True])
def test_a_compiled_block_is_one_graph_and_equal(shared: bool) -> None:
    torch.compiler.reset()
    block = Block(shared)
    x = some_x(2, 5, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    out, want = compiled(x), block(x)
    torch.testing.assert_close(out, want)
    inputs = [x, *block.masters()]
    for grad, expected in zip(
        torch.autograd.grad(out.square().sum(), inputs), torch.autograd.grad(want.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(grad, expected)
    for linear in (block.q, block.k, block.out):
        linear.adapter.scale = 0.0
    torch.testing.assert_close(compiled(x), block(x))
    for linear in (block.q, block.k, block.out):
        linear.adapter.scale = 0.25
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("shared", [False, True])
def test_alike_blocks_share_one_graph(shared: bool) -> None:
    # One graph per block would soon pass torch's recompile limit, and then run uncompiled.
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    x = some_x(2, 5, dtype=torch.float32)
    for block in [Block(shared) for _ in range(10)]:
        torch.compile(block, backend=count, fullgraph=True)(x)
    assert len(graphs) == 1


def test_recomputation_gives_the_same_gradients() -> None:
    block = Block(shared=True)
    x = some_x(2, 5, dtype=torch.float32)
    stored = torch.autograd.grad(block(x).square().sum(), block.masters())
    again = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).square().sum(), block.masters())
    for one, two in zip(stored, again, strict=True):
        assert torch.equal(one, two)


def test_no_grad_saves_nothing() -> None:
    block = Block(shared=True)
    with torch.no_grad():
        out = block(some_x(4, dtype=torch.float32))
    assert out.grad_fn is None
