"""Runs as earlier versions left them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def as_of_0_2(run: Path) -> Path:
    """The run as version 0.2.0 left it: no template in config.yaml, run.json or trainer.json, and nothing there of its
    rotary angles."""
    settings = run / "config.yaml"
    settings.write_text("".join(s for s in settings.read_text().splitlines(True) if not s.startswith("chat_template")))
    if (run / "run.json").exists():
        record = json.loads((run / "run.json").read_text())
        record["config"].pop("chat_template", None)
        (run / "run.json").write_text(json.dumps(record))
    for checkpoint in (run / "checkpoints").glob("step-*"):
        state = json.loads((checkpoint / "trainer.json").read_text())
        for name in ("chat_template", "rotary_angles"):
            state.pop(name, None)
        (checkpoint / "trainer.json").write_text(json.dumps(state))
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        for file in manifest["files"]:
            content = (checkpoint / file["name"]).read_bytes()
            file |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return run
