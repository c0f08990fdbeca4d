"""Peak memory of a training step over long rows on this CPU, beside what the plan predicts.

    python benchmarks/long_context.py [--tokens 65536 262144] [--ranks 1 2] [--layers 2] [--document 512]

A model of nano's width in bfloat16 with every layer recomputed, through Lumina's engine. A row is packed with documents
of --document tokens: attention over one document of a million would be days on a CPU, and hold scores of 256 queries
with all its keys, which no kernel of a GPU does. The vocabulary is small, so that the output layer shows little.
Measured is, of the rank that needs the most, the highest resident memory of a step over its own after a step over a
short row, in which everything but activations is there; tensors of a document and more are mapped and given back
(MALLOC_MMAP_THRESHOLD_), so that none is counted that is free. Predicted is what lumina.plan.costs says of activations
and output layer on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

VOCABULARY = 512
SHORT = 512  # tokens of a rank's first step
MAPPED = 1 << 16  # bytes from which on a tensor is mapped by itself


def configuration(tokens: int, ranks: int, tile: int, groups: int, arguments: argparse.Namespace) -> Any:
    from lumina.config import load

    sets = [f"seq_length={tokens}", f"num_layers={arguments.layers}", "precision=bf16", "gradient_checkpointing=true"]
    sets += ["tie_word_embeddings=false", "gradient_accumulation_steps=1", f"sequence_parallel_size={ranks}"]
    if tile:
        sets.append(f"mlp_tile_tokens={tile}")
    queries, keys = arguments.heads
    sets += [f"num_heads={queries}", f"num_kv_heads={keys}", f"attention_head_groups={groups}"]
    return load("nano", {"batch_size": 1}, sets).replace(vocab_size=VOCABULARY)


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def row(tokens: int, document: int, part: Any) -> Any:
    import numpy as np

    from lumina.data import Batch

    ids = np.random.default_rng(0).integers(VOCABULARY, size=tokens)
    edges = np.append(np.arange(0, tokens, document), tokens).astype(np.int32)
    positions = np.arange(tokens) - np.repeat(edges[:-1], np.diff(edges))
    own = slice(*part.bounds(tokens))
    arrays = (each[own] for each in (ids, np.roll(ids, -1), np.ones(tokens, np.float32), positions))
    return Batch(*arrays, edges, document, part=part).torch()


def worker(arguments: argparse.Namespace) -> None:
    """One rank: prints the bytes that a step took as JSON."""
    import torch

    from lumina.config import deepspeed as ds_json
    from lumina.data import Part
    from lumina.model import Transformer, sequence_group
    from lumina.train.deepspeed import Engine, startup

    torch.set_num_threads(1)
    ranks = startup.init_process_group()
    (tokens,) = arguments.tokens
    config = configuration(tokens, ranks.world, arguments.tile, arguments.groups, arguments)
    resolved = ds_json.resolve(config, ranks.world, "cpu", document=ds_json.default_json(ranks.world, 0))
    model = Transformer(resolved.config)
    model.checkpoint_every = 1
    if arguments.tile:
        model.tile_feed_forward(arguments.tile)
    model.group_heads(arguments.groups)
    sequence = sequence_group(ranks.world)
    if sequence is not None:
        model.share_rows(sequence)
    engine = Engine(model, resolved.config, resolved.json)
    engine.set_lr(1e-4)
    part = Part(ranks.rank, ranks.world)

    def step(batch: Any) -> None:
        engine.accumulate(batch, 1 / tokens, last=True)
        engine.step()

    step(row(SHORT * ranks.world, arguments.document, part))
    before = resident("VmRSS")
    batch = row(tokens, arguments.document, part)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    step(batch)
    print("taken", json.dumps(resident("VmHWM") - before), flush=True)
    startup.destroy_process_group()
    startup.end_process(0)


def measured(tokens: int, ranks: int, tile: int, groups: int, arguments: argparse.Namespace) -> float:
    """Bytes of the rank that took the most."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, str(Path(__file__).resolve()), "--worker", "--tokens", str(tokens), "--tile", str(tile)]
    line += [
        "--groups",
        str(groups),
        "--heads",
        *map(str, arguments.heads),
        "--layers",
        str(arguments.layers),
        "--document",
        str(arguments.document),
    ]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    common |= {"MALLOC_MMAP_THRESHOLD_": str(MAPPED), "LOCAL_WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            line,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    texts = [process.communicate()[0] for process in started]
    found = [re.search(r"^taken (\d+)$", text, re.MULTILINE) for text in texts]
    if not all(found):
        sys.exit("a rank failed:\n" + "\n".join(texts)[-3000:])
    return max(float(match[1]) for match in found if match)


def predicted(tokens: int, ranks: int, tile: int, groups: int, arguments: argparse.Namespace) -> tuple[float, str]:
    """Bytes of activations and output layer at the highest moment, and which that is."""
    from lumina.plan.costs.memory import peak_memory
    from lumina.plan.costs.setup import Data, Setup

    data = Data(tokens, arguments.document, 1.0, 1.0, "")
    config = configuration(tokens, ranks, tile, groups, arguments)
    more: dict[str, Any] = {"mlp_tile": tile} if tile else {}
    setup = Setup(
        1, 1, ranks, "bf16", checkpoint_every=1, sequence_parallel=ranks, on_cpu=True,
        document_tokens=data.document_tokens, head_groups=groups, **more,
    )  # fmt: skip
    peak = peak_memory(config, setup)
    return peak.activations + peak.output, peak.moment


def way(text: str) -> tuple[int, int]:
    """TILE,GROUPS"""
    tile, groups = text.split(",")
    return int(tile), int(groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536, 262144])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    ways = [(0, 1), (2048, 1)]
    parser.add_argument(
        "--ways",
        type=way,
        nargs="+",
        default=ways,
        metavar="TILE,GROUPS",
        help="tokens of a tile (0: no tiles), and groups of heads (1: all heads at once)",
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, nargs=2, default=[4, 2], metavar=("H", "K"), help="query, key/value heads")
    parser.add_argument("--document", type=int, default=512)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tile", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--groups", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    print("| tokens | ranks | tile | groups | measured | predicted | error | bytes a token and rank | highest in the |")
    print("|---|---|---|---|---|---|---|---|---|")
    for tokens in arguments.tokens:
        for ranks in arguments.ranks:
            for tile, groups in arguments.ways:
                taken = measured(tokens, ranks, tile, groups, arguments)
                expected, moment = predicted(tokens, ranks, tile, groups, arguments)
                cells = [
                    f"{tokens:,}",
                    ranks,
                    tile or "none",
                    groups,
                    f"{taken / 1e6:,.0f} MB",
                    f"{expected / 1e6:,.0f} MB",
                ]
                cells += [f"{expected / taken - 1:+.1%}", f"{taken * ranks / tokens:,.0f}", moment]
                print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
