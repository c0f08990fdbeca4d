"""Files of preference pairs."""

from __future__ import annotations

import json
import random
from pathlib import Path


def write_pairs(path: Path, count: int, seed: int) -> Path:
    """Of two answers the one without the dog is preferred."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            words = [rng.choice(["my sister", "the weather", "that film", "your garden"]) for _ in range(3)]
            question = {"role": "user", "content": f"Well, {words[0]} was a surprise!"}
            chosen = {"role": "assistant", "content": f"Honestly, {words[1]} makes me happy."}
            rejected = {"role": "assistant", "content": f"I think our dog keeps {words[2]} awake."}
            file.write(json.dumps({"prompt": [question], "chosen": [chosen], "rejected": [rejected]}) + "\n")
    return path
