"""A real ComfyUI server in a process of its own, driven over HTTP as a front end drives it.

`Server` starts `serve.py`, with the probe nodes as the first custom node, and is its client. It
needs nothing but Python's standard library.
"""

import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from .comfy_host import SOURCES, PromptError, raise_failure, refusal

RIG = Path(__file__).parent
POLL_SECONDS = 0.02
TAIL = 4000

__all__ = ["PromptError", "Server"]


class Server:
    """A serving ComfyUI; a context manager that ends it.

    Attributes: `base` (models, outputs and `server.log` are there), `url`, `process`.
    """

    def __init__(
        self,
        base: Path,
        nodes: Mapping[str, Path] | Iterable[tuple[str, Path]] = (),
        comfyui: str = next(iter(SOURCES)),
        accelerators: int = 2,
        argv: Iterable[str] = (),
        timeout: float = 120.0,
    ):
        """Start ComfyUI and wait until it accepts requests.

        Args:
            base: its base directory, made if missing.
            nodes: folder name -> custom node package, in the order in which they are to load,
                after `probe`.
            comfyui: its version, one of `comfy_host.SOURCES`.
            accelerators: how many are simulated; with 0 it runs on the CPU.
            argv: further command line arguments of ComfyUI.
            timeout: seconds that one request, prompt or "free" may take.

        Raises:
            RuntimeError: it did not come up; the end of its log is in the message.
        """
        self.base = Path(base)
        self.base.mkdir(parents=True, exist_ok=True)
        self.timeout = timeout
        self._client_id = uuid.uuid4().hex
        command = [sys.executable, str(RIG / "serve.py"), "--comfyui", comfyui]
        command += ["--base", str(self.base), "--accelerators", str(accelerators)]
        for name, path in {"probe": RIG / "probe_nodes", **dict(nodes)}.items():
            command += ["--node", f"{name}={path}"]
        with self._log_path.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--", *argv], stdout=subprocess.PIPE, stderr=log, text=True
            )
        # The announcement, or nothing where the process ends before it.
        too_late = threading.Timer(timeout, self.process.kill)
        too_late.start()
        announcement = self.process.stdout.readline().split()
        too_late.cancel()
        if announcement[:1] != ["SERVING"]:
            self.close()
            raise self._failure("ComfyUI did not start")
        self.url = f"http://127.0.0.1:{announcement[1]}"

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_error) -> None:
        self.close()

    def queue(self, prompt: Mapping[str, dict]) -> dict:
        """Queue `prompt` (API format), wait until the worker is done; return its history entry.

        Raises:
            PromptError: it was refused, a node failed, or it was interrupted.
        """
        body = {"prompt": prompt, "client_id": self._client_id}
        try:
            prompt_id = self._request("/prompt", body)["prompt_id"]
        except urllib.error.HTTPError as error:
            reply = json.load(error)
            raise refusal(reply["error"], reply["node_errors"]) from None

        def entry():
            return self._request(f"/history/{prompt_id}").get(prompt_id)

        entry = self._poll(entry, "the prompt")
        self.settle()
        raise_failure(entry["status"]["messages"])
        return entry

    def free(self, unload_models: bool = False, free_memory: bool = False) -> dict:
        """POST to `/free` as ComfyUI-Manager's buttons do; return `turns` once it is acted upon.

        The worker wakes for a flag only while it waits: it is let come to rest before, and asked
        again where it took one flag before the request had set the other.
        """
        before = len(self.settle()["taken"])
        asked = {"unload_models": unload_models, "free_memory": free_memory}
        wanted = {flag for flag, value in asked.items() if value}
        while True:
            self._request("/free", asked)
            turns = self.settle()
            wanted -= {flag for flags in turns["taken"][before:] for flag in flags}
            if not wanted:
                return turns
            asked = dict.fromkeys(wanted, True)

    def settle(self) -> dict:
        """Wait until the worker rests, in two looks at it with no turn between; return `turns`.

        Flags can be pending then: those that code set while the worker was in a turn, for which
        ComfyUI wakes it no more. They are taken in its next turn, whatever that comes from.
        """
        last = None

        def rested():
            nonlocal last
            before, last = last, self.turns()
            return last if last["idle"] and last == before else None

        return self._poll(rested, "the worker's rest")

    def turns(self) -> dict:
        """What the worker is at: `idle`, the pending `flags`, and the list of those it has `taken`,
        one dict for each turn that had any."""
        return self._request("/probe/turns")

    def probe(self) -> dict:
        """The state of the process: see `probe_nodes.state`."""
        return self._request("/probe")

    def object_info(self, node: str) -> dict:
        """What the front end is told of a node class; KeyError if there is none of that name."""
        return self._request(f"/object_info/{node}")[node]

    def log(self) -> str:
        """All that it has logged and printed so far."""
        return self._log_path.read_text(errors="replace")

    def close(self) -> None:
        """End the server as Ctrl-C does, or by force where it does not end within 10 seconds."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()

    @property
    def _log_path(self) -> Path:
        return self.base / "server.log"

    def _request(self, path: str, body: dict | None = None):
        """GET, or POST with a JSON body; return the JSON of the reply, None where it is empty."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                text = reply.read()
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            raise self._failure(f"no reply to {path}: {error}") from error
        return json.loads(text) if text else None

    def _poll(self, look, what: str):
        """Call `look` until it returns something; return that."""
        end = time.monotonic() + self.timeout
        while not (found := look()):
            if time.monotonic() > end:
                raise self._failure(f"waited {self.timeout} s for {what}")
            time.sleep(POLL_SECONDS)
        return found

    def _failure(self, message: str) -> RuntimeError:
        status = self.process.poll()
        running = "running" if status is None else f"ended with status {status}"
        return RuntimeError(f"{message}; the server is {running}\n{self.log()[-TAIL:]}")
