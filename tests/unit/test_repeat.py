"""Which calls may run again after they ran out of memory."""

import pytest
import torch

from block_swap.swap_hooks import keeps_state

X = torch.zeros(1, 2)
ABOVE = {"transformer_options": {"wrappers": {"outer_sample": {"cache": [print]}}}}
WRAPPED = {"transformer_options": {"wrappers": {"diffusion_model": {"cache": [print]}}}}


@pytest.mark.parametrize(
    ("args", "kwargs", "outermost", "keeps"),
    [
        ((X, X), {}, True, False),
        ((X, X), {"transformer_options": {"sigmas": X}}, True, False),
        ((X, [{"k": X, "end": 0}]), {}, False, True),  # a cache for every block
        ((X,), {"kv_caches": [{"end": 0}]}, False, True),
        ((X,), {"transformer_options": {"ar_state": object()}}, True, True),
        ((X,), WRAPPED, True, True),  # it would see two passes
        ((X,), ABOVE, True, False),  # it sees the one that it has begun
        ((X,), WRAPPED, False, False),  # it sees the one around what is repeated
        ((X,), {"transformer_options": None}, True, False),
        ((X, [X, X], (4, 4)), {}, True, False),
    ],
)
def test_a_call_that_keeps_state_runs_once(args, kwargs, outermost, keeps):
    assert keeps_state(args, kwargs, outermost) == keeps
