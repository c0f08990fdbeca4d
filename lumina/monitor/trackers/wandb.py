"""Weights & Biases. WANDB_ENTITY, WANDB_MODE, WANDB_BASE_URL, WANDB_TAGS … are honoured by the library itself.

Without a login, or when the service cannot be reached at the start, the run is recorded in RUN/wandb, to be sent later
with `wandb sync`. The run's id is WANDB_RUN_ID, or one that is kept in RUN/wandb-run: a run that goes on does so there
too.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from lumina.files import read_text, write_text
from lumina.monitor.tracking import GROUPS, RunInfo

log = logging.getLogger("lumina")

_PATIENCE = float(os.environ.get("LUMINA_WANDB_PATIENCE", 60))  # seconds that it may take to reach its service
_FILE_HEADER, _BLOCK, _RECORD_HEADER = 7, 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


class Wandb:
    def __init__(self) -> None:
        self._run: Any = None
        self._given = False  # the run is one that this process had before
        self._others: set[int] | None = None  # wandb's processes that serve runs from before; None until it is opened

    def open(self, run: RunInfo) -> Mapping[str, int]:
        import wandb

        before = wandb.setup().most_recent_active_run  # also one that is not wandb.run
        self._others = {process.pid for process in _services()} if before is not None else set()
        remembered = run.folder / "wandb-run"
        given = os.environ.get("WANDB_RUN_ID")  # the user's job looks for the run under it
        again = run.step > 0 and (given is not None or remembered.exists())
        run_id = given or (read_text(remembered).strip() if again else secrets.token_hex(4))
        write_text(remembered, run_id)
        self._run = self._start(wandb, run, run_id)
        self._given = self._run is before
        for group in GROUPS.values():
            self._run.define_metric(f"{group}/step", hidden=True)
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        return self._reached(run.folder, run_id) if again else {}

    def _start(self, wandb: Any, run: RunInfo, run_id: str) -> Any:
        settings = wandb.Settings(
            silent=True,
            console="off",
            x_disable_stats=True,  # Lumina measures the system itself
            init_timeout=_PATIENCE,
        )
        given: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", "lumina"),
            "name": os.environ.get("WANDB_NAME", run.name),
            "id": run_id,
            "resume": os.environ.get("WANDB_RESUME", "allow"),
            "reinit": os.environ.get("WANDB_REINIT", "return_previous"),  # else a notebook's own run would be ended
            "dir": str(run.folder),
            "config": dict(run.config),
            "settings": settings,
        }
        if os.environ.get("WANDB_MODE", "online") != "online":
            return wandb.init(**given)
        try:
            if not wandb.login(prompt=False):  # never ask at the keyboard
                raise ConnectionError("not logged in")
            return wandb.init(**given)
        except Exception as error:
            kept = run.folder / "wandb"
            log.warning("wandb: %s; recorded in %s, send it later with `wandb sync`", error or "no login", kept)
            return wandb.init(mode="offline", **given)

    def _reached(self, folder: Path, run_id: str) -> dict[str, int]:
        """The last step of each group that the service, or an earlier start's file, has."""
        last: dict[str, int] = {}
        for row in offline_rows(folder, run_id):
            _raise(last, row)
        _raise(last, dict(self._run.summary))
        return last

    def scalars(self, group: str, step: int, values: Mapping[str, float], time: float | None) -> None:
        self._run.log({f"{group}/step": step, **{f"{group}/{name}": value for name, value in values.items()}})

    def text(self, name: str, step: int, text: str) -> None:
        self._run.log({f"{name}/step": step, name: text})

    def rewind(self, step: int) -> bool:
        return False  # a history only ever grows

    def close(self) -> None:
        if not self._given:
            self._run.finish()

    def abandon(self) -> None:
        """End wandb's own process: Python would wait for it, and it for the network. Its file stays in RUN/wandb. It
        goes on where it serves other runs of this process too, such as a notebook's."""
        if self._others is None or self._given:
            return
        import wandb

        if wandb.setup().most_recent_active_run not in (None, self._run):
            return
        ended = [process for process in _services() if process.pid not in self._others]
        for process in ended:
            with suppress(psutil.Error):
                process.kill()
        if ended:
            with suppress(Exception, SystemExit):  # it reports the end that it was given
                wandb.teardown()  # else the next run of this process would look for that one


def _services() -> list[psutil.Process]:
    """The processes that wandb has started from this one, and what those have started."""
    found = []
    for child in psutil.Process().children():  # not those that a program started from here has for its own runs
        with suppress(psutil.Error):
            if child.name().startswith("wandb-") and child.status() != psutil.STATUS_ZOMBIE:
                found += [child, *child.children(recursive=True)]
    return found


def _raise(last: dict[str, int], row: Mapping[str, Any]) -> None:
    for group in GROUPS.values():
        step = row.get(f"{group}/step")
        if isinstance(step, int | float):
            last[group] = max(last.get(group, -1), int(step))


def offline_rows(folder: Path, run_id: str) -> Iterator[dict[str, Any]]:
    """The history rows in the files that wandb left in `folder`, oldest file first."""
    from wandb.proto import wandb_internal_pb2

    protocol: Any = wandb_internal_pb2  # generated: a type checker sees no names
    for path in sorted((folder / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb")):
        for payload in _records(path.read_bytes()):
            record = protocol.Record()
            record.ParseFromString(payload)
            if record.WhichOneof("record_type") == "history":
                yield {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file, which is a LevelDB log (blocks of 32 KiB; records cut at their edges) after a
    header of its own; a tail cut short by a kill is left out. wandb itself has no reader in Python any more (0.31)."""
    at, parts = _FILE_HEADER, b""
    while at + _RECORD_HEADER <= len(data):
        room = _BLOCK - at % _BLOCK
        if room < _RECORD_HEADER:  # too small for a header: zeros
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += _RECORD_HEADER
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or at + length > len(data):
            return
        piece, at = data[at : at + length], at + length
        parts = piece if kind in (_FULL, _FIRST) else parts + piece
        if kind in (_FULL, _LAST):
            yield parts


TRACKER = Wandb
