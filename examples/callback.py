"""End a run when it is good enough: `python examples/callback.py data/chitchat.train.jsonl`."""

import math
import sys

from lumina import Callback, load_config, train


class StopWhenGood(Callback):
    """Records the loss in bits, and stops (after a save) once a step's is below `bits`."""

    def __init__(self, bits: float) -> None:
        self.bits = bits

    def after_step(self, context, result) -> None:
        bits = result.loss / math.log(2)
        context.log("bits per token", bits)
        if bits < self.bits:
            context.stop(f"{bits:.2f} bits per token")


if __name__ == "__main__":
    settings = {"train_data": sys.argv[1:], "experiment_name": "good-enough", "max_steps": 200}
    run = train(load_config("nano", **settings), callbacks=[StopWhenGood(bits=8.0)])
    print(run.folder, *(record["bits per token"] for record in run.metrics("callback")))
