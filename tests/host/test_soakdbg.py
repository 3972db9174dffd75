import random
from test_auto import *
def test_soak(bench, card, log):
    rng = random.Random(5)
    expected = {}
    files = ["wan.safetensors", "other.safetensors"]
    sizes = [(64, 64, 5), (128, 128, 5), (64, 128, 9), (128, 128, 17)]
    start = None
    fails = 0
    def prompt(file, size, seed, text):
        loader = bench.distorch(text, unet_name=file) if text else prompts.plain(file)
        nodes = prompts.guided({"1": loader}, "1", seed, 1)
        nodes["22"] = {**prompts.EMPTY_LATENT, "inputs": {"width": size[0], "height": size[1], "length": size[2], "batch_size": 1}}
        bench.host.run(nodes)
        return bench.host.custom_module("probe").LATENTS.pop("out")
    card(64)
    for file in files:
        for size in sizes:
            for seed in (1, 2):
                expected[file, size, seed] = prompt(file, size, seed, "")
    bench.clear()
    changes = 0; last = None
    for n in range(120):
        card(rng.choice([12, 14, 16, 20]))
        file, size, seed = rng.choice(files), rng.choice(sizes), rng.choice([1, 2])
        out = prompt(file, size, seed, AUTO)
        assert torch.equal(out, expected[file, size, seed]), (n, file, size, seed)
    print("repeats", len(log("which is repeated")))
    bench.clear(); gc.collect()
    print("left", dict(ledger.allocated))
