"""Using a trained model: load it, generate, talk to it, take it elsewhere."""

from lumina.infer.commands import (
    chat_command,
    evaluate_command,
    export_command,
    generate_command,
    import_command,
    serve_command,
)
from lumina.infer.generation.generate import Answer, generate, stream
from lumina.infer.generation.sampling import Sampling
from lumina.infer.hf.exporting import export
from lumina.infer.hf.importing import import_hf
from lumina.infer.loading import Loaded, find_checkpoint, load

__all__ = [
    "Answer",
    "Loaded",
    "Sampling",
    "chat_command",
    "evaluate_command",
    "export",
    "export_command",
    "find_checkpoint",
    "generate",
    "generate_command",
    "import_command",
    "import_hf",
    "load",
    "serve_command",
    "stream",
]
