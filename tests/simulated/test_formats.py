"""Weights that are more than plain tensors: they travel as they are and stay what they are."""

import pytest
import torch

from block_swap.packed_weights import Pack
from block_swap.swap_executor import BlockSwap
from rig import simulator

LAYERS = 6
DIM = 32


class TaggedTensor(torch.Tensor):
    """Plain memory with attributes and a logical shape, as ComfyUI-GGUF's ``GGMLTensor`` has."""

    @property
    def shape(self):
        return getattr(self, "tensor_shape", self.size())

    def detach(self):
        return self

    def copy_(self, *_args, **_kwargs):
        raise AssertionError("GGMLTensor.copy_ swallows its errors: nothing may rely on it")


def tagged(weight, scale):
    """``weight`` as int8 rows with a scale in an attribute; one byte of padding a row."""
    data = torch.zeros(weight.shape[0], weight.shape[1] + 1, dtype=torch.int8)
    data[:, :-1] = (weight / scale).round().to(torch.int8)
    tensor = data.as_subclass(TaggedTensor)
    tensor.scale, tensor.tensor_shape, tensor.patches = scale, weight.shape, []
    return torch.nn.Parameter(tensor, requires_grad=False)


class TaggedLinear(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = tagged(weight, 0.01)

    def forward(self, x):
        weight = self.weight
        assert isinstance(weight, TaggedTensor)
        assert weight.shape == (DIM, DIM)
        assert weight.device == x.device
        data = weight.as_subclass(torch.Tensor)[:, :-1].to(x.dtype) * weight.scale
        for patch in weight.patches:
            data = data + patch
        return torch.nn.functional.linear(x, data)


def quantized(weight):
    """``weight`` as comfy-kitchen's fp8 tensor: data and scale in a wrapper."""
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    scale = torch.tensor(0.01)
    params = kitchen.TensorCoreFP8Layout.Params(
        scale=scale, orig_dtype=torch.float32, orig_shape=tuple(weight.shape)
    )
    data = (weight / scale).to(torch.float8_e4m3fn)
    tensor = kitchen.QuantizedTensor(data, "TensorCoreFP8Layout", params)
    return torch.nn.Parameter(tensor, requires_grad=False)


class QuantizedLinear(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = quantized(weight)

    def forward(self, x):
        weight = self.weight
        assert type(weight).__name__ == "QuantizedTensor"
        assert weight._qdata.is_contiguous() and weight._params.scale.device == x.device
        return torch.nn.functional.linear(x, weight.dequantize())


class Fp8Linear(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        assert self.weight.dtype is torch.float8_e4m3fn
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))


class Model(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(DIM, DIM, generator=generator) * 0.3 for _ in range(LAYERS)]
        self.blocks = torch.nn.ModuleList(kind(weight) for weight in weights)

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


KINDS = {"attributes": TaggedLinear, "wrapper": QuantizedLinear, "fp8": Fp8Linear}
BYTES = {
    "attributes": DIM * (DIM + 1),
    "wrapper": DIM * DIM + 4,
    "fp8": DIM * DIM,
}


def swap_of(model, homes):
    packs = [Pack.layout(block.modules()) for block in model.blocks]
    for pack, home in zip(packs, homes, strict=True):
        pack.place(torch.device(home))
    swap = BlockSwap(torch.device("acc:0"), packs, [[f"blocks.{i}"] for i in range(LAYERS)])
    swap.update(2)
    swap.allocate_slots()
    swap.drive(model)
    simulator.reset()
    return swap


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("homes", [["cpu"] * 6, ["acc:0", "cpu", "acc:1"] * 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_that_of_the_unswapped_model(kind, homes, inference):
    with torch.inference_mode(inference):
        x = torch.randn(4, DIM, generator=torch.Generator().manual_seed(1))
        expected = Model(KINDS[kind])(x)
        model = Model(KINDS[kind])
        swap = swap_of(model, homes)
        for _ in range(3):
            assert torch.equal(model(x.to("acc:0")).cpu(), expected)
        swap.settle()
        for pack in swap._packs:
            pack.place(torch.device("cpu"))
        swap.update(2)
        assert torch.equal(model(x.to("acc:0")).cpu(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_that_travel_are_the_stored_ones(kind):
    model = Model(KINDS[kind])
    swap_of(model, ["cpu"] * LAYERS)
    x = torch.randn(4, DIM).to("acc:0")
    model(x)
    simulator.ledger.clear_copies()
    model(x)
    for copy in simulator.ledger.copies:
        assert BYTES[kind] <= copy.nbytes < BYTES[kind] + 2 * 256  # padding


def test_attributes_follow_the_weight_into_its_slot_and_home():
    model = Model(TaggedLinear)
    swap = swap_of(model, ["cpu"] * LAYERS)
    x = torch.randn(4, DIM, generator=torch.Generator().manual_seed(1))
    plain = model(x.to("acc:0")).cpu()
    patch = torch.full((DIM, DIM), 0.1)
    reference = Model(TaggedLinear)
    for patched, device in ((model, "acc:0"), (reference, "cpu")):
        patched.blocks[2].weight.patches = [patch.to(device)]
    assert torch.equal(model(x.to("acc:0")).cpu(), reference(x))
    model.blocks[2].weight.patches = []
    assert torch.equal(model(x.to("acc:0")).cpu(), plain)
    assert all(isinstance(block.weight, torch.nn.Parameter) for block in model.blocks)
    assert len(swap._packs) == LAYERS


def test_what_others_hang_on_a_module_is_absorbed_where_it_fits():
    model = Model(Fp8Linear)
    swap = swap_of(model, ["cpu"] * LAYERS)
    block, pack = model.blocks[1], swap._packs[1]
    home = block.weight
    ones = torch.ones(DIM, DIM).to(torch.float8_e4m3fn)
    other = torch.nn.Parameter(ones.to("acc:0"), requires_grad=False)
    with swap.writing_homes():
        block.weight = other
        assert pack.absorb() == 0
    assert block.weight is home
    assert torch.equal(home.float(), torch.ones(DIM, DIM))
    wide = torch.nn.Parameter(torch.ones(DIM, 2 * DIM), requires_grad=False)
    block.weight = wide
    assert pack.absorb() == wide.nbytes
    model.blocks[1].weight = wide
    with swap.forward_pass(model):
        assert model.blocks[1].weight is wide
    block.weight = torch.nn.Parameter(home.clone(), requires_grad=False)
    assert pack.absorb() == 0
    assert block.weight is home


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_a_slot_are_aligned_whatever_their_sizes(kind):
    """Kernels that load whole vectors fault on "misaligned address" otherwise."""
    seen = []

    class Odd(KINDS[kind]):
        def __init__(self, weight):
            super().__init__(weight)
            self.odd = torch.nn.ParameterList(torch.zeros(length) for length in (3, 1, 5))

        def forward(self, x):
            (slot,) = [slot for slot in swap._slots if slot.uses]
            start = slot.buffer.data_ptr()
            for weight in self.parameters():
                for tensor in leaves(weight):
                    assert tensor.is_contiguous()
                    assert start <= tensor.data_ptr() < start + slot.buffer.nbytes
                    seen.append((tensor.data_ptr() - start) % 256)
            return super().forward(x)

    model = Model(Odd)
    swap = swap_of(model, ["cpu"] * LAYERS)
    model(torch.randn(4, DIM).to("acc:0"))
    assert len(seen) == LAYERS * (5 if kind == "wrapper" else 4)
    assert set(seen) == {0}


def leaves(weight):
    """The tensors with memory of their own that a weight consists of."""
    if hasattr(type(weight), "__tensor_flatten__"):
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return [weight]
