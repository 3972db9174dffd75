"""What passes need beside the weights: estimated, learnt, and told to the user."""

import pytest

from block_swap.pass_memory import SLACK, PassKind, PassMemory, Room

GIB = 1 << 30
VIDEO = PassKind.of("WanModel", "torch.bfloat16", (1, 16, 21, 60, 104))


def test_conditioning_that_comes_as_channels_is_the_same_pass():
    assert PassKind.of("WanModel", "torch.bfloat16", (1, 36, 21, 60, 104)) == VIDEO
    assert PassKind.of("WanModel", "torch.float16", (1, 16, 21, 60, 104)) != VIDEO
    assert PassKind.of("WanModel", "torch.bfloat16", (1, 16, 22, 60, 104)) != VIDEO


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((1, 16, 21, 60, 104), "81 frames at 832x480"),
        ((1, 16, 1, 60, 104), "1 frames at 832x480"),
        ((2, 16, 128, 128), "1024x1024"),
        ((1, 64, 4000), "a latent of 1x4000"),
    ],
)
def test_a_latent_is_told_as_users_know_it(shape, text):
    assert PassKind.of("Model", "float", shape).describe() == text


def test_nothing_is_known_before_the_first_pass():
    memory = PassMemory()
    assert not memory.knows(VIDEO)
    assert memory.need(VIDEO, 123.0) == 123.0


def test_what_was_seen_counts_with_some_slack():
    memory = PassMemory()
    memory.learn(VIDEO, 1000)
    memory.learn(VIDEO, 900)  # a later pass may need less
    assert memory.need(VIDEO, 5.0) == pytest.approx(1000 * (1 + SLACK))


def test_another_batch_of_the_same_is_known_in_proportion():
    """ComfyUI asks for twice the batch, to run cond and uncond at once."""
    memory = PassMemory()
    memory.learn(VIDEO, 1000)
    assert memory.knows(VIDEO.batched(2))
    assert memory.need(VIDEO.batched(2), 5.0) == pytest.approx(2000 * (1 + SLACK))
    memory.learn(VIDEO.batched(2), 1500)
    assert memory.need(VIDEO.batched(2), 5.0) == pytest.approx(1500 * (1 + SLACK))
    assert memory.need(VIDEO, 5.0) == pytest.approx(1000 * (1 + SLACK))


def test_another_video_is_not_known():
    memory = PassMemory()
    memory.learn(VIDEO, 1000)
    longer = PassKind.of("WanModel", "torch.bfloat16", (1, 16, 41, 60, 104))
    assert not memory.knows(longer)
    assert memory.need(longer, 5.0) == 5.0


def test_a_pass_that_failed_is_given_more_each_time_until_one_runs():
    """It shows only where it stopped."""
    memory = PassMemory()
    memory.fail(VIDEO, 1000)
    first = memory.need(VIDEO, 5.0)
    assert memory.knows(VIDEO) and first > 1000
    memory.fail(VIDEO, 1000)
    assert memory.need(VIDEO, 5.0) > first
    memory.learn(VIDEO, 1200)
    assert memory.need(VIDEO, 5.0) == pytest.approx(1200 * (1 + SLACK))


def test_room_says_why():
    room = Room(11.6 * GIB, 6.5 * GIB, "81 frames at 832x480")
    assert str(room) == "5.10 GiB: 11.60 GiB free, 6.50 GiB for 81 frames at 832x480"
    assert room.nbytes == pytest.approx(5.1 * GIB)


def test_there_is_no_less_than_no_room():
    assert Room(GIB, 2 * GIB).nbytes == 0
    assert Room(1e32, 0).nbytes > 0


def test_a_failure_in_another_batch_is_known_in_proportion():
    memory = PassMemory()
    memory.fail(VIDEO.batched(2), 2000)
    assert memory.knows(VIDEO)
    assert memory.need(VIDEO, 0) > 1000


@pytest.mark.parametrize("failed", [False, True])
def test_what_was_too_little_is_not_given_again_whatever_the_allocator_counts(failed):
    """Memory that is free in pieces: the pass has failed with more than its peak says."""
    memory = PassMemory()
    note = memory.fail if failed else memory.learn
    note(VIDEO, 1000, least=5000)
    memory.learn(VIDEO, 1000)
    assert memory.need(VIDEO, 0) == 5000
    assert memory.need(VIDEO.batched(2), 0) == 10000
    assert memory.knows(VIDEO)
