"""What the process and its devices hold: nothing of an ejected model, no more with every round."""

from itertools import cycle, islice

from prompts import FILES, distorch, graph

ROUNDS = 50
DRIFT = 0.02
STRINGS = ("acc:0,40mb;acc:1,20mb;cpu,*", "acc:0,50%;cpu,50%", "acc:0,100%")


def test_fifty_rounds_of_prompt_free_prompt_hold_no_more_than_three(start):
    with start(layers=8, dim=512, ffn=2048) as server:
        configurations = [(text, keep) for keep in (False, True) for text in STRINGS]
        held, rss = {}, []
        for number, (text, keep) in enumerate(islice(cycle(configurations), ROUNDS)):
            loader = distorch(FILES["kept"], text, keep_loaded=keep)
            server.queue(graph({"kept": loader}, 2 * number))
            server.free(unload_models=True, free_memory=True)
            freed = server.probe()["devices"]
            server.queue(graph({"kept": loader}, 2 * number + 1))
            state = server.probe()
            held.setdefault((text, keep), set()).add((*freed.values(), *state["devices"].values()))
            rss.append(state["rss"])
        assert {key: len(figures) for key, figures in held.items()} == dict.fromkeys(held, 1)
        drift = [figure / rss[3] - 1 for figure in rss[3:]]
        assert max(drift) < DRIFT, [f"{share:+.1%}" for share in drift]


def test_an_ejected_models_memory_is_given_back(start):
    """90% of its size at the least, also by `unload_models` alone, which empties no node cache."""
    with start(layers=8, dim=1024, ffn=4096) as server:
        size = (server.base / "models" / "diffusion_models" / FILES["flagged"]).stat().st_size
        prompt = graph({"flagged": distorch(FILES["flagged"], "acc:0,50%;acc:1,10%;cpu,40%")})
        server.queue(graph({"flagged": distorch(FILES["kept"], "acc:0,100%")}))
        server.free(unload_models=True, free_memory=True)  # what the first load imports stays
        for asked in ({"unload_models": True}, {"free_memory": True}):
            server.queue(prompt)
            before = server.probe()
            server.free(**asked)
            after = server.probe()
            print(f"{asked}: {(before['rss'] - after['rss']) / size:.1%} of {size / 2**20:.0f} MiB")
            assert before["rss"] - after["rss"] > 0.9 * size
            assert set(after["devices"].values()) == {0}
