"""Files damaged on purpose: bytes at random, JSON values of the wrong kind, safetensors whose headers lie."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

_VALUES: list[Any] = [None, True, False, 0, -1, 1, 2, 3, 10**9, 2**31, 2**63, 2**64, 10**30, 1e308, 0.5, float("nan")]
_VALUES += [float("inf"), "", "x", "1", "../x.safetensors", "/etc/passwd", "\0", "\ud800", "<|im_end|>", "F64", "U8"]
_VALUES += [[], [0], [1, -1], [2**62, 2**62], [[]], {}, {"a": 1}, [None], [{}], {"type": "BPE"}, {"content": 5}]


def damaged(data: bytes, name: str, draw: random.Random, payload: bytes = b"") -> bytes:
    """The contents of a file called `name`, damaged in one of many ways. `payload` is a pickle that may take its
    place."""
    how = draw.randrange(10)
    if how == 0:
        return draw.choice([b"", b"\0" * 100, b"{", b"[" * 5000, b"null", b"\xff\xfe" + data, payload, data * 2])
    if how < 4:
        return _bytes(data, draw)
    if name.endswith(".safetensors"):
        return _header(data, draw)
    if name.endswith(".json"):
        return _encoded(_value(json.loads(data), draw))
    return _bytes(data, draw)


def _bytes(data: bytes, draw: random.Random) -> bytes:
    """Flipped, cut, repeated and overwritten bytes, where headers and text are."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        if not changed:
            break
        at = draw.randrange(min(len(changed), 4000))
        how = draw.randrange(5)
        if how == 0:
            changed[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            del changed[at : at + draw.randint(1, 50)]
        elif how == 2:
            changed[at:at] = changed[at : at + 20]
        elif how == 3:
            del changed[at:]
        else:
            changed[at] = draw.choice(b'0919"{}[],:-enull%')
    return bytes(changed)


def _value(root: Any, draw: random.Random) -> Any:
    """JSON with a value somewhere inside that is of another kind, gone, or there twice."""
    here, depth = root, draw.randint(1, 5)
    for step in range(depth):
        keys = list(here) if isinstance(here, dict) else list(range(len(here))) if isinstance(here, list) else []
        if not keys:
            break
        key = draw.choice(keys)
        inside = here[key]
        if step + 1 < depth and isinstance(inside, (dict, list)) and inside:
            here = inside
            continue
        how = draw.randrange(8)
        if how == 0:
            del here[key]
        elif how == 1 and isinstance(here, list):
            here.append(inside)
        elif how == 2 and isinstance(inside, (int, float)) and not isinstance(inside, bool):
            here[key] = draw.choice([-inside, inside + 1, inside * 2, inside * 10**9, str(inside), float(inside)])
        else:
            here[key] = draw.choice(_VALUES)
        break
    return draw.choice(_VALUES) if draw.randrange(30) == 0 else root


def _encoded(value: Any) -> bytes:
    """As JSON, escaped or not; unescaped, lone surrogates become bytes that are not UTF-8."""
    return json.dumps(value, ensure_ascii=len(str(value)) % 2 == 0).encode("utf-8", "surrogatepass")


def _header(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file with another header: sizes, places, shapes and types that are not true."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if draw.randrange(4) == 0:
        lie = draw.choice([0, 1, length - 1, length + 1, len(data), 2**31, 10**8, 2**63, 2**64 - 1])
        return struct.pack("<Q", lie) + data[8:]
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    how = draw.randrange(6)
    if how == 0:
        entry["data_offsets"][draw.randrange(2)] = draw.choice([0, -1, 2**31, 2**63, len(body) + 1, 10**30, "x"])
    elif how == 1:
        entry["shape"] = draw.choice([[2**40, 2**40], [-1], [], [0], [2**63], entry["shape"][::-1], ["a"], 7])
    elif how == 2:
        entry["dtype"] = draw.choice(["F64", "I64", "U8", "BOOL", "F8_E4M3", "PICKLE", "", 3])
    elif how == 3:
        header[draw.choice(["../x", "extra", "", name + ".copy"])] = dict(entry)
    elif how == 4:
        del header[name]
    else:
        header = _value(header, draw)
    written = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(written)) + written + body


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.write_text, (self.target, "executed"))
