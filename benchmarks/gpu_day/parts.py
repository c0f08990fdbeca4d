"""The parts of the day in their order, most valuable first: a run that is cut short loses the last ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """`seconds`: after which a part is ended. Its code is part_NAME.py."""

    name: str
    seconds: int
    what: str
    rehearsed: str  # what a rehearsal on a CPU leaves out


PARTS = (
    Part("numbers", 75, "kernels, attention, offloading: right numbers", "interpreter, one shape; float32; no streams"),
    Part("losses", 120, "20 steps of nano by precision and ZeRO stage; kill and resume", "a tiny model, no fp16"),
    Part("steps", 165, "medium, 1b, large through the engine; a profiled step", "one tiny model, no --compile"),
    Part("peers", 110, "transformers' Trainer, with and without Liger", "one tiny model, no Liger"),
    Part("kernels", 90, "kernels and output layer by graph replay, two shapes", "interpreter, wall clock, 3 operators"),
    Part("shards", 60, "ZeRO-2 and ZeRO-3 on one card", "a tiny model"),
    Part("decode", 60, "decoding: 1, 8 and ragged", "a tiny model, 8 tokens"),
    Part("recovery", 70, "out of memory and rebuild; first and second save", "a planted error, a tiny model"),
)
NAMES = tuple(part.name for part in PARTS)

#: A rehearsal's limit for each part: a shared CPU may be slow, and a part that hangs must still end.
REHEARSED_SECONDS = 150
