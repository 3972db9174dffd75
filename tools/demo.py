"""Shows the block swap at work: a real ComfyUI, a tiny Wan, an allocation over several devices.

    make demo [MULTIGPU_DIR=<checkout of ComfyUI-MultiGPU>]

Runs on the GPU where there is one, else on two simulated accelerators (whose speed says nothing).
Prints the split, the bytes to move, on the simulator those that moved, and whether the latent
equals the unswapped one. Exits with 1 when it does not, or when other bytes moved than told.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from rig import comfy_host, prompts, simulator, tiny_wan  # noqa: E402

VERSION = next(iter(comfy_host.SOURCES))
STEPS = 3


def block_copies(split) -> list[simulator.Copy]:
    """The copies of swapped blocks to the compute device that the simulator has seen."""
    sizes = {split.sizes.blocks[index].nbytes for index in split.swapped}
    compute = split.compute_device
    return [c for c in simulator.ledger.copies if c.destination == compute and c.nbytes in sizes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--multigpu", type=Path, help="checkout of ComfyUI-MultiGPU")
    multigpu = parser.parse_args().multigpu
    if multigpu is not None and not (multigpu / "distorch_2.py").is_file():
        parser.error(f"{multigpu} is no checkout of ComfyUI-MultiGPU: it has no distorch_2.py")
    torch.set_num_threads(1)  # the tensors are tiny
    gpu = torch.cuda.is_available()
    compute, text = "acc:0", "acc:0,12mb;acc:1,3mb;cpu,*"
    if gpu:
        compute, text = "cuda:0", "cuda:0,12mb;cpu,*"
    else:
        simulator.install(count=2)

    rig = ROOT / "tests" / "rig"
    nodes = [
        ("probe", rig / "probe_nodes"),
        ("ComfyUI-MultiGPU", multigpu or rig / "multigpu_double"),
        ("block_swap", ROOT),
    ]
    source = comfy_host.fetch(VERSION, ROOT / ".cache")
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models" / "diffusion_models"
        models.mkdir(parents=True)
        tiny_wan.write_wan(models / "wan.safetensors")
        logging.disable(logging.ERROR)  # what this ComfyUI misses: its front end, optional nodes
        argv = ["--bf16-unet", "--cache-classic"]
        host = comfy_host.Host.boot(
            source, Path(folder), nodes, accelerators=not gpu, gpu=gpu, argv=argv
        )
        logging.disable(logging.NOTSET)
        logging.getLogger("MultiGPU").setLevel(logging.INFO)
        return compare(host, compute, text, "real" if multigpu else "its double")


def compare(host: comfy_host.Host, compute: str, text: str, multigpu: str) -> int:
    """Sample with and without the swap; print what happened; 0 where both are the same."""
    latents = host.custom_module("probe").LATENTS
    plain = prompts.plain("wan.safetensors")
    distorch = prompts.distorch("wan.safetensors", text, compute)
    host.run(prompts.guided({"1": plain}, "1", 1, STEPS))
    expected = latents.pop("out")
    host.free(unload_models=True, free_memory=True)

    print(f"\nComfyUI {VERSION}, MultiGPU: {multigpu}, compute device: {compute}\n", flush=True)
    host.run(
        prompts.guided({"1": distorch}, "1", 2, STEPS)
    )  # loads the model, and the slots are warm afterwards
    simulator.ledger.clear_copies()
    host.run(prompts.guided({"1": distorch}, "1", 1, STEPS))
    equal = torch.equal(latents.pop("out"), expected)

    state = next(
        vars(loaded.model.model)["_distorch2_block_swap"]
        for loaded in host.mm.current_loaded_models
        if loaded.model is not None
    )
    passes = 2 * STEPS  # cond and uncond
    told = passes * state.split.bytes_per_pass
    as_told = True
    print(f"\n{passes} forward passes, {told / 2**20:.2f} MiB to move:")
    if compute == "acc:0":
        copies = block_copies(state.split)
        moved = sum(copy.nbytes for copy in copies)
        as_told = moved == told
        print(f"  {moved / 2**20:.2f} MiB of blocks moved up in {len(copies)} copies")
        simulator.check()
        print("  no race between copies and computation")
    print(f"  the latent is {'bit-equal to' if equal else 'DIFFERENT FROM'} the unswapped one")
    return 0 if equal and as_told else 1


if __name__ == "__main__":
    sys.exit(main())
