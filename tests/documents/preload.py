"""What the warm server (warm.py) imports once for all the commands that it will run."""

from contextlib import suppress
from importlib import import_module

from lumina.train.deepspeed import import_deepspeed

MODULES = (
    "lumina.commands.data",
    "lumina.infer.generation.generate",
    "lumina.infer.hf.exporting",
    "lumina.infer.hf.importing",
    "lumina.infer.repl",
    "lumina.infer.serve.server",
    "lumina.train.run",
    "openai",
    "torch._dynamo",  # imported by torch's optimizers when the first is made
    "transformers",
)

import_deepspeed()
for name in MODULES:
    with suppress(ImportError):  # of an extra that is not installed
        import_module(name)
