"""How many agents the launcher's store carries: simulated agents against a real LauncherControl on loopback.

    python benchmarks/store_load.py [--agents 125 1250] [--seconds 8] [--drivers 2]

Every simulated agent has the two connections of a real one (lumina.cluster.elastic.agent): one sends a heartbeat once a
second and asks whether it is fenced off, the agent asks for commands five times a second. The drivers do that for one
agent after the other as fast as they can, while the launcher looks at events and at every agent's heartbeats ten times
a second, as the supervisor does. Printed: store operations a second, and for how many agents that is enough; the
launcher's own look at all of them; and how long it takes until a command has reached them all. Drivers, launcher and
store share the machine's cores here: a real launcher has its cores for itself."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier, Event

HEARTBEATS, COMMANDS = 1, 5  # a second: heartbeats (with the look for a fence), and looks for commands
LOOKS = 10  # a second, of the launcher at every agent's heartbeats
OPERATIONS = 2 * HEARTBEATS + COMMANDS


def drive(port: int, agents: int, ready: Barrier, go: Event, seconds: float, rounds: multiprocessing.Queue) -> None:
    """Be `agents` agents: agent-seconds done, and when the command came to the last of them."""
    from lumina.cluster.elastic.control import AgentControl, connect

    endpoint = f"127.0.0.1:{port}"
    began = time.monotonic()
    with ThreadPoolExecutor(64) as pool:  # as agents do it, at the same time; and some wait for DNS
        controls = list(pool.map(lambda n: AgentControl(connect(endpoint, "load"), {"node": f"n{n}"}), range(agents)))
        connections = list(pool.map(lambda _: connect(endpoint, "load"), controls))
    connected = time.monotonic() - began
    ready.wait()
    go.wait()
    done, began = 0, time.monotonic()
    while time.monotonic() - began < seconds:
        for control, connection in zip(controls, connections, strict=True):
            for _ in range(HEARTBEATS):
                connection.add(f"heartbeat/{control.index}", 1)
                connection.check([f"fenced/{control.index}"])
            for _ in range(COMMANDS):
                control.commands()
            done += 1
            if time.monotonic() - began >= seconds:
                break
    took = time.monotonic() - began
    ready.wait()  # the launcher gives a command here
    waiting = list(controls)
    while waiting:
        waiting = [control for control in waiting if not control.commands()]
    rounds.put((done / took, connected, time.monotonic()))
    ready.wait()


def measure(agents: int, drivers: int, seconds: float) -> None:
    from lumina.cluster.elastic.control import ControlCommand, LauncherControl

    launcher = LauncherControl("load", host="127.0.0.1")
    context = multiprocessing.get_context("spawn")
    ready, go, rounds = context.Barrier(drivers + 1), context.Event(), context.Queue()
    shares = [agents * (n + 1) // drivers - agents * n // drivers for n in range(drivers)]
    processes = [context.Process(target=drive, args=(launcher.port, n, ready, go, seconds, rounds)) for n in shares]
    for process in processes:
        process.start()
    ready.wait()
    hellos = len(launcher.events())
    assert hellos == agents, f"{hellos} of {agents} agents came"
    go.set()
    looks, began = [], time.monotonic()
    while time.monotonic() - began < seconds:
        look = time.monotonic()
        launcher.events()
        for agent in range(agents):
            launcher.heartbeats(agent)
        looks.append(time.monotonic() - look)
        time.sleep(max(0.0, 1 / LOOKS - looks[-1]))
    ready.wait()
    ordered = time.monotonic()
    launcher.send(ControlCommand("generation", 1, tuple(range(agents))))
    found = [rounds.get() for _ in processes]
    ready.wait()
    for process in processes:
        process.join()
    rate = sum(one for one, _, _ in found)
    connected, reached = max(c for _, c, _ in found), max(t for _, _, t in found) - ordered
    print(
        f"{agents:5d} agents ({2 * agents} connections, made in {connected:.1f} s): {rate * OPERATIONS:,.0f} agents' "
        f"operations/s, enough for {rate:,.0f} agents; the launcher's look at all takes "
        f"{1e3 * statistics.median(looks):.0f} ms; a command reaches all in {reached:.2f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="+", default=[125, 1250], help="nodes; 8 GPUs each, say")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--drivers", type=int, default=2)
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    print(
        f"an agent makes {OPERATIONS} store operations a second; {os.cpu_count()} CPUs, {arguments.drivers} driver(s)"
    )
    for agents in arguments.agents:
        measure(agents, arguments.drivers, arguments.seconds)


if __name__ == "__main__":
    main()
