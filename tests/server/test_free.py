"""The table of "free": who is ejected, who survives, what the next prompt reads."""

import pytest

from prompts import FILES, PATHS, distorch, graph, loaders, plain, reads
from rig.server import PromptError

OUT_OF_MEMORY = "out of memory"
NO_SMART_MEMORY = "--disable-smart-memory"
ROWS = {
    "flagged only": ("flagged",),
    "kept only": ("kept",),
    "both": ("flagged", "kept"),
    "none by DisTorch2": ("plain",),
    OUT_OF_MEMORY: ("flagged", "kept"),
    NO_SMART_MEMORY: ("flagged", "kept"),
}
ASKED = {
    "unload_models": {"unload_models": True},
    "free_memory": {"free_memory": True},
    "both": {"unload_models": True, "free_memory": True},
}
COLUMNS = ("models", "/free", "ejected", "survived", "files read next", "device bytes")


@pytest.fixture(scope="module")
def table(pytestconfig):
    """Rows of text, printed at the end."""
    rows = []
    yield rows
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (COLUMNS, *rows)]
    with pytestconfig.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, sep="\n")


@pytest.fixture(scope="module")
def reference(session_server):
    """The latents of each file's unswapped model for seeds 1 and 2, by role and seed."""
    digests = {}
    for role, file in FILES.items():
        for seed in (1, 2):
            session_server.queue(graph({role: plain(file)}, seed))
            digests[role, seed] = session_server.probe()["latents"][role]
        session_server.free(unload_models=True, free_memory=True)
    return digests


def clean(server, *roles):
    """Turn the switches off and free."""
    server.queue(graph(loaders(*roles, keep=False), seed=9))
    server.free(unload_models=True, free_memory=True)


@pytest.fixture(scope="module")
def smart_and_not(session_server, start):
    """The server of each row; one of its own where a command line option says so."""
    with start(NO_SMART_MEMORY) as not_smart:
        yield lambda row: not_smart if row == NO_SMART_MEMORY else session_server


def flags_of(state):
    """The roles of the models that ComfyUI holds, told by their flags."""
    roles = {True: "flagged", False: "kept", None: "plain"}
    return {roles[loaded["flag"]] for loaded in state["loaded"]}


def text(roles):
    return "+".join(sorted(roles)) or "-"


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("row", ROWS)
def test_matrix(smart_and_not, reference, table, row, asked):
    server, roles = smart_and_not(row), ROWS[row]
    server.queue(graph(loaders(*roles)))
    before = server.probe()
    held = flags_of(before)
    if row == OUT_OF_MEMORY:
        with pytest.raises(PromptError, match="ProbeOutOfMemory"):
            server.queue(graph(loaders(*roles), out_of_memory=list(ASKED).index(asked) + 1))
        assert set(server.probe()["devices"].values()) == {0}
    server.free(**ASKED[asked])
    after = server.probe()
    survived = flags_of(after)
    server.queue(graph(loaders(*roles), seed=2))
    following = server.probe()
    read = reads(after, following)
    sizes = ["/".join(f"{n / 2**20:.2f}" for n in s["devices"].values()) for s in (before, after)]
    ejected = text(held - survived)
    shown = [f"{path.rpartition('/')[2]} {n}" for path, n in read.items()]
    table.append((row, asked, ejected, text(survived), ", ".join(shown) or "-", " -> ".join(sizes)))
    clean(server, *roles)

    lets_all_go = row in (OUT_OF_MEMORY, NO_SMART_MEMORY)
    kept = set() if lets_all_go else {"kept"} & set(roles)
    assert survived == kept
    assert after["flags"] == following["flags"] == {}
    if not kept:
        assert set(after["devices"].values()) == {0}
    for loaded in after["loaded"]:
        assert loaded in before["loaded"]
    if row == "kept only":
        assert after["devices"] == before["devices"]
    # What ComfyUI alone ejects stays in its node cache, in RAM, until that is freed as well; so
    # does a kept model that running out of memory has taken off its devices.
    comfyui_alone = {"plain", "flagged", "kept"} if row == NO_SMART_MEMORY else {"plain", "kept"}
    cached = comfyui_alone if asked == "unload_models" else kept
    assert read == {PATHS[role]: 1 for role in roles if role not in cached}
    for role in roles:
        assert following["latents"][role] == reference[role, 2]
    state = server.probe()
    assert (state["loaded"], state["races"], set(state["devices"].values())) == ([], [], {0})


@pytest.mark.parametrize("strength", [None, 0.7], ids=["bare", "lora"])
def test_a_kept_models_next_prompt_opens_no_model_file(server, strength):
    prompts = [graph(loaders("kept"), seed, lora=strength) for seed in (1, 2)]
    unswapped = graph({"kept": plain(FILES["kept"])}, 2, lora=strength)
    server.queue(unswapped)
    expected = server.probe()["latents"]["kept"]
    server.free(unload_models=True, free_memory=True)
    server.queue(prompts[0])
    for asked in ASKED.values():
        server.free(**asked)
        before = server.probe()
        server.queue(prompts[1])
        after = server.probe()
        assert reads(before, after).get(PATHS["kept"], 0) == 0
        assert after["latents"]["kept"] == expected
        assert len(after["loaded"]) == 1
        server.queue(prompts[0])
    clean(server, "kept")


def test_a_prompt_without_keep_loaded_is_one_with_the_switch_off(server):
    for inputs in ({}, {"keep_loaded": False}):
        server.queue(graph({"flagged": distorch(FILES["flagged"], **inputs)}))
        assert [loaded["flag"] for loaded in server.probe()["loaded"]] == [True]
        server.free(unload_models=True)
        assert server.probe()["loaded"] == []


@pytest.fixture(scope="module")
def cramped(start):
    """A server that lets a model on the compute device only when nothing else is there."""
    with start("--reserve-vram", "1000") as server:
        yield server


@pytest.fixture
def made_room(cramped):
    """Leaves the kept model loaded and the flagged one in the same workflow, evicted for it.

    Its blocks on other accelerators stay for its next turn; ComfyUI's list has it no more.
    """
    cramped.queue(graph(loaders("kept")))
    alone = cramped.probe()["devices"]
    first = graph(loaders("flagged"))
    for seed in (2, 3):  # at the second time the flagged one's latent is cached
        cramped.queue({**first, **graph(loaders("kept"), seed)})
    state = cramped.probe()
    assert flags_of(state) == {"kept"}
    assert state["devices"]["acc:1"] == 2 * alone["acc:1"]
    yield alone
    clean(cramped, "flagged", "kept")


@pytest.mark.parametrize("asked", ASKED)
def test_a_flagged_model_that_made_room_for_another_is_ejected(cramped, made_room, asked):
    cramped.free(**ASKED[asked])
    after = cramped.probe()
    assert after["devices"] == made_room
    cramped.queue(graph(loaders("flagged", "kept"), seed=4))
    assert reads(after, cramped.probe()) == {PATHS["flagged"]: 1}


def test_out_of_memory_lets_a_model_go_that_had_made_room(cramped, made_room):
    failing = graph(loaders("kept"), out_of_memory=1)
    with pytest.raises(PromptError, match="ProbeOutOfMemory"):
        cramped.queue({**graph(loaders("flagged")), **failing})
    assert set(cramped.probe()["devices"].values()) == {0}
