"""Serve a real ComfyUI over HTTP on 127.0.0.1, with simulated accelerators.

    python tests/rig/serve.py --base DIR --node name=path [--node ...] [-- ComfyUI's arguments]

Prints `SERVING <port>`, and nothing else, on standard output once it accepts requests; all the
rest goes to standard error. SIGTERM ends it as Ctrl-C does. `rig.server` is its client.
"""

import argparse
import logging
import signal
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
# Not this folder, which Python puts here for a script: its modules are named as ComfyUI's are.
sys.path[0] = str(ROOT / "tests")

import torch  # noqa: E402
from aiohttp import web  # noqa: E402

from rig import comfy_host, simulator  # noqa: E402


class AnnouncedSite(web.TCPSite):
    """A site that prints the port it got; ComfyUI does not tell it when asked for port 0."""

    async def start(self):
        await super().start()
        (_, port), *_ = self._runner.addresses
        print(f"SERVING {port}", file=sys.__stdout__, flush=True)


def custom_node(text: str) -> tuple[str, Path]:
    """Parse `name=path`."""
    name, separator, path = text.partition("=")
    if not separator or not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"not name=folder: {text!r}")
    return name, Path(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    newest = next(iter(comfy_host.SOURCES))
    parser.add_argument("--comfyui", choices=comfy_host.SOURCES, default=newest)
    parser.add_argument("--base", type=Path, required=True, help="models, output, ... go there")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument(
        "--node",
        type=custom_node,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a custom node package; they load in the order given",
    )
    parser.add_argument("--accelerators", type=int, default=2, help="0: run on the CPU")
    parser.add_argument("argv", nargs="*", metavar="-- ARGUMENT", help="passed on to ComfyUI")
    return parser.parse_args()


def main() -> None:
    """Start, announce, and serve until interrupted."""
    options = parse_arguments()
    sys.stdout = sys.stderr
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(1)  # the tensors are tiny
    if options.accelerators:
        simulator.install(count=options.accelerators)
    _, (loop, _, serve_for_ever) = comfy_host.start(
        comfy_host.fetch(options.comfyui, ROOT / ".cache"),
        options.base,
        options.node,
        accelerators=options.accelerators > 0,
        argv=["--listen", "127.0.0.1", "--port", str(options.port), *options.argv],
    )
    try:
        with mock.patch.object(web, "TCPSite", AnnouncedSite):
            loop.run_until_complete(serve_for_ever())
    except KeyboardInterrupt:
        logging.info("Stopped serving")


if __name__ == "__main__":
    main()
