"""Preflight probe, run on each node: questions as JSON lines on standard input, answers on standard output.

`lumina.cluster.preflight.run` asks them; each gets one answer, in order.

A question is {"id": N, "do": NAME, …}; the answer carries its id, and `error` where the question could not be answered.
The first line is an answer to nobody, with id 0: the node has been reached. The process ends when its input does, so
that nothing is left on a node whose head is gone; a cut cable closes no input, and a clock ends it then.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import queue
import shutil
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from lumina import __version__
from lumina.cluster import topology
from lumina.config import UserError

_LONGEST = 600.0  # seconds that a probe lives when nothing is heard of its head; the first question says better
_POLL = 0.1
_SMALL_ROUNDS = 40
_LARGEST = {"gloo": 2**26, "nccl": 2**30}  # bytes of the largest message
_LONG_ENOUGH = 0.25  # seconds that one all-reduce may take before messages grow no further

Answer = dict[str, Any]


def own_versions() -> dict[str, str | None]:
    """What can be known without importing torch."""
    found: dict[str, str | None] = {"lumina": __version__, "Python": platform.python_version()}
    for label, name in (("torch", "torch"), ("DeepSpeed", "deepspeed")):
        try:
            found[label] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[label] = None
    return found


class Listener:
    """TCP listener on every address that sends a token to whoever connects, as proof of which process it is."""

    def __init__(self, port: int, token: str) -> None:
        """Port 0 is any free one. Raises OSError where it is taken."""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("", port))
            self._socket.listen(1024)
        except OSError:
            self._socket.close()
            raise
        self.port = int(self._socket.getsockname()[1])
        self._token = token.encode()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            with suppress(OSError), connection:
                connection.sendall(self._token)

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # close alone does not end a waiting accept
        self._socket.close()


def try_to_connect(address: str, port: int, token: str, patience: float) -> str | None:
    """What went wrong, or None."""
    try:
        with socket.create_connection((address, port), timeout=patience) as connection:
            connection.settimeout(patience)
            said = b""
            while len(said) < len(token) and (more := connection.recv(256)):
                said += more
    except TimeoutError:
        return f"no answer within {patience:g} s"
    except OSError as error:
        return error.strerror or str(error)
    return None if said == token.encode() else "something else answers there"


def wait_for_text(path: Path, text: str, patience: float) -> bool:
    """Whether a file comes to hold a text: a network file system may show it a little later."""
    deadline = time.monotonic() + patience
    while True:
        with suppress(OSError, UnicodeDecodeError):
            if path.read_text(encoding="ascii") == text:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)


class Probe:
    """The answers. Every public method is one, by its name."""

    def __init__(self) -> None:
        self._listener: Listener | None = None
        self._store: Any = None
        self._interface = ""
        self._own_file: Path | None = None

    def facts(self, environment: dict[str, str], peer: str | None) -> Answer:
        """What this machine is. `peer`: the address of a machine that ranks here will talk to."""
        os.environ.update(environment)
        node = topology.read()
        torch_facts = _torch_facts()
        gpus = [asdict(gpu) for gpu in node.gpus] or torch_facts.pop("devices", [])
        torch_facts.pop("devices", None)
        facts = {
            "versions": {**own_versions(), **torch_facts.pop("versions", {})},
            "cores": len(node.cores),
            "cpus": sum(len(core.cpus) for core in node.cores),
            "gpus": gpus,
            "memory": psutil.virtual_memory().total,
            "infiniband": node.infiniband,
            "machine": topology.machine_identity(),
            "interface": None,
            "network_error": None,
            **torch_facts,
        }
        try:
            chosen = topology.choose_interface(node, peer or os.environ.get("SSH_CONNECTION", "127.0.0.1").split()[0])
            self._interface = chosen.name
            facts |= {"interface": asdict(chosen), "summary": node.summary(chosen)}
        except UserError as error:
            facts |= {"network_error": error.message, "summary": node.summary()}
        return facts

    def time(self) -> Answer:
        return {"time": time.time()}

    def share(self, folder: str, mark: str, name: str, token: str, patience: float) -> Answer:
        """Whether the head's file is seen here; and leave one for the head to see."""
        place = Path(folder)
        if not place.is_dir():
            return {"there": False, "seen": False, "wrote": None, "free": None}
        seen = wait_for_text(place / f"{mark}.head", token, patience)
        wrote = None
        self._own_file = place / f"{mark}.{name}"
        try:
            self._own_file.write_text(token, encoding="ascii")
        except OSError as error:
            wrote = error.strerror
        return {"there": True, "seen": seen, "wrote": wrote, "free": shutil.disk_usage(place).free}

    def unshare(self) -> Answer:
        """Take the file away again."""
        if self._own_file is not None:
            with suppress(OSError):
                self._own_file.unlink(missing_ok=True)
        return {}

    def listen(self, port: int, token: str) -> Answer:
        self._listener = Listener(port, token)
        return {"port": self._listener.port}

    def connect(self, targets: list[dict[str, Any]], patience: float) -> Answer:
        """Try them all at once: {name: what went wrong, or None}."""
        with ThreadPoolExecutor(max_workers=max(1, len(targets))) as pool:
            tried = {
                target["name"]: pool.submit(
                    try_to_connect, target["address"], target["port"], target["token"], patience
                )
                for target in targets
            }
        return {"failed": {name: future.result() for name, future in tried.items() if future.result()}}

    def meet(self, world: int, port: int) -> Answer:
        """Hold the store at which the ranks of the all-reduce find each other."""
        from lumina.cluster.elastic.torch_store import TCPStore

        if self._listener is not None:
            self._listener.close()
        self._store = TCPStore("127.0.0.1", port, world, is_master=True, wait_for_workers=False)
        return {"port": self._store.port}

    def allreduce(self, backend: str, address: str, port: int, rank: int, world: int, patience: float) -> Answer:
        """Latency (s) of the smallest message, and bandwidth (B/s) of the largest that takes about a quarter of a
        second, counted as nccl-tests' bus bandwidth: bytes * 2 (n-1)/n / seconds."""
        import torch.distributed as dist

        from lumina.cluster.elastic.torch_store import TCPStore

        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, self._interface)
        limit = timedelta(seconds=patience)
        store = self._store or TCPStore(address, port, world, is_master=False, timeout=limit)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        try:
            return _measure(backend, world)
        finally:
            dist.destroy_process_group()


def _torch_facts() -> Answer:
    """Everything that needs torch; `torch_error` where it cannot be imported."""
    try:
        import torch

        cuda = torch.version.cuda or torch.version.hip
        nccl = None
        if cuda and torch.distributed.is_nccl_available():
            nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        visible = torch.cuda.device_count()
        seen = [torch.cuda.get_device_properties(index) for index in range(visible)]
    except Exception as error:  # whatever is broken in a stranger's installation
        return {"torch_error": f"{type(error).__name__}: {error}"[:500], "visible": 0}
    devices = [asdict(topology.Gpu(i, props.name, props.total_memory)) for i, props in enumerate(seen)]
    versions = {"torch": torch.__version__, "CUDA": cuda, "NCCL": nccl}
    return {"torch_error": None, "versions": versions, "visible": visible, "devices": devices}


def _measure(backend: str, world: int) -> Answer:
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")

    def timed(numbers: int) -> float:
        """Seconds of one all-reduce; its result is checked."""
        x = torch.ones(numbers, device=device)
        if backend == "nccl":
            torch.cuda.synchronize()
        start = time.perf_counter()
        dist.all_reduce(x)
        if backend == "nccl":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if not bool((x == world).all()):
            raise RuntimeError(f"an all-reduce of ones over {world} ranks gave {float(x.min())} to {float(x.max())}")
        return seconds

    def slowest(seconds: float) -> float:
        """The same on every rank, which must agree on when to stop."""
        worst = torch.tensor(seconds, dtype=torch.float64, device=device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return float(worst)

    for _ in range(3):  # the first ones make the connections
        timed(1)
    latency = slowest(statistics.median(timed(1) for _ in range(_SMALL_ROUNDS)))
    size = 2**20
    while True:
        seconds = slowest(min(timed(size // 4) for _ in range(2)))
        if seconds > _LONG_ENOUGH or size >= _LARGEST[backend]:
            break
        size *= 2
    return {"latency": latency, "bandwidth": size * 2 * (world - 1) / world / seconds, "bytes": size}


def _read(questions: queue.Queue[Answer], end: Callable[[int], None]) -> None:
    for line in sys.stdin:
        with suppress(ValueError):  # a login script's noise is not for us
            questions.put(json.loads(line))
    end(0)


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    probe = Probe()

    def end(code: int) -> None:
        probe.unshare()
        os._exit(code)  # also out of a collective that hangs

    def clock(seconds: float) -> threading.Timer:
        timer = threading.Timer(seconds, end, (3,))
        timer.daemon = True
        timer.start()
        return timer

    timer = clock(_LONGEST)
    questions: queue.Queue[Answer] = queue.Queue()
    threading.Thread(target=_read, args=(questions, end), daemon=True).start()
    print(json.dumps({"id": 0, "host": socket.gethostname()}), file=answers)
    while True:
        question = questions.get()
        number, name = question.pop("id"), question.pop("do")
        if "limit" in question:
            timer.cancel()
            timer = clock(question.pop("limit"))
        try:
            answer = getattr(probe, name)(**question)
        except Exception as error:  # the head makes a finding of it
            answer = {"error": f"{type(error).__name__}: {error}"[:1000]}
        print(json.dumps({"id": number, **answer}), file=answers)


if __name__ == "__main__":
    main()
