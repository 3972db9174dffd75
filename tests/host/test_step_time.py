"""The time of a step on the virtual clock, against max(resident step, bytes / bandwidth)."""

import pytest
import torch

from conftest import COMPUTE, LAYERS
from rig import simulator

clock = simulator.clock
PASSES = 4


@pytest.fixture
def forward(bench):
    """Runs ``PASSES`` passes of a loaded patcher's model; returns the virtual seconds of one."""

    def run(patcher):
        model, dtype = patcher.model.diffusion_model, patcher.model.get_dtype_inference()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 16, 4, 16, 16, generator=generator).to(COMPUTE, dtype)
        context = torch.randn(1, 16, 4096, generator=generator).to(COMPUTE, dtype)
        t = torch.full((1,), 500.0).to(COMPUTE)
        start, end = (torch.acc.Event(enable_timing=True) for _ in range(2))
        with torch.inference_mode():
            model(x, t, context)
            model(x, t, context)
            start.record()
            for _ in range(PASSES):
                model(x, t, context)
            end.record()
        return start.elapsed_time(end) / 1000 / PASSES

    yield run
    clock.reset_rates()


@pytest.mark.parametrize("ratio", [0.25, 0.7, 1.0, 1.4, 4.0])
@pytest.mark.parametrize("blocks", [2, 4, 5, 6, 7])
def test_a_step_is_within_5_percent_of_the_bound(bench, forward, blocks, ratio):
    """``blocks``: the quota's room behind non-block weights; ``ratio``: compute over transfer."""
    clock.flops = 1e9
    resident = bench.load(bench.distorch("acc:0,1gb;cpu,*"))
    bench.mm.load_models_gpu([resident])
    sizes = bench.state(resident).split.sizes
    clock.set_bandwidth(1e30)
    resident_step = forward(resident)
    bench.clear()

    block = sizes.blocks[0].nbytes
    bandwidth = block / (resident_step / LAYERS) * ratio
    quota = sizes.total_bytes - LAYERS * block + blocks * block
    patcher = bench.load(bench.distorch(f"acc:0,{quota}b;cpu,*"))
    bench.mm.load_models_gpu([patcher])
    split = bench.state(patcher).split
    clock.set_bandwidth(bandwidth, "cpu", COMPUTE)
    bound = max(resident_step, split.bytes_per_pass / bandwidth)
    assert forward(patcher) <= 1.05 * bound
