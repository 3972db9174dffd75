"""What the process and its devices hold: nothing of an ejected model, no more with every round."""

from itertools import cycle, islice

import pytest

from prompts import FILES, distorch, graph

FILE = FILES["kept"]
ROUNDS = 50
DRIFT = 0.02
STRINGS = ("acc:0,20mb;acc:1,10mb;cpu,*", "acc:0,50%;cpu,50%", "acc:0,100%")


@pytest.fixture
def exact(monkeypatch):
    """Servers started now return freed memory to the system at once, so that their resident memory
    is what they hold. glibc's allocator, left alone, keeps of it what suits its own threshold."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")


def test_fifty_rounds_of_prompt_free_prompt_hold_no_more_than_three(start, exact):
    configurations = [(text, keep) for keep in (False, True) for text in STRINGS]
    held, rss = {}, []
    with start(layers=4, dim=512, ffn=2048) as server:
        for number, (text, keep) in enumerate(islice(cycle(configurations), ROUNDS)):
            loader = distorch(FILE, text, keep_loaded=keep)
            server.queue(graph({"kept": loader}, 2 * number))
            server.free(unload_models=True, free_memory=True)
            freed = server.probe()
            assert len(freed["loaded"]) == keep
            server.queue(graph({"kept": loader}, 2 * number + 1))
            state = server.probe()
            figures = (*freed["devices"].values(), *state["devices"].values())
            held.setdefault((text, keep), set()).add(figures)
            rss.append(state["rss"])
    assert {key: len(figures) for key, figures in held.items()} == dict.fromkeys(held, 1)
    # Against the first round of the same string: without swapped blocks there are no slots.
    drift = [figure / rss[number % len(STRINGS)] - 1 for number, figure in enumerate(rss)]
    print(f"{min(drift):+.2%} to {max(drift):+.2%} of {rss[0] / 2**20:.0f} MiB")
    assert all(abs(share) < DRIFT for share in drift), [f"{share:+.1%}" for share in drift]


@pytest.mark.parametrize("allocator", ["as it is", "exact"])
def test_an_ejected_models_memory_is_given_back(start, request, allocator):
    """90% of its size at the least, also by `unload_models` alone, which empties no node cache."""
    if allocator == "exact":
        request.getfixturevalue("exact")
    loader = {"flagged": distorch(FILE, "acc:0,50%;acc:1,20%;cpu,30%")}
    with start(layers=6, dim=1024, ffn=4096) as server:
        size = (server.base / "models" / "diffusion_models" / FILE).stat().st_size
        for seed, asked in enumerate(({"unload_models": True}, {"free_memory": True})):
            server.queue(graph(loader, seed=seed))
            before = server.probe()
            server.free(**asked)
            after = server.probe()
            gone = before["rss"] - after["rss"]
            print(f"{asked}: {gone / size:.0%} of {size / 2**20:.0f} MiB")
            assert gone > 0.9 * size
            assert set(after["devices"].values()) == {0}
