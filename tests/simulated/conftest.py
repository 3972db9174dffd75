"""Three simulated accelerators, checked for races and leaks after every test."""

import gc
import sys
from pathlib import Path

import pytest
import torch

from rig import simulator

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # the tensors are tiny
simulator.install(count=3)
gc.freeze()  # collecting torch itself before and after every test takes most of their time


@pytest.fixture(autouse=True)
def simulated():
    gc.collect()
    simulator.reset()
    before = dict(simulator.ledger.allocated)
    yield
    gc.collect()
    simulator.check()
    assert simulator.ledger.allocated == before, "device memory leaked"
