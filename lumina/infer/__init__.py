"""Using a trained model: load it, generate, talk to it, take it elsewhere."""

from lumina.infer.commands import generate_command
from lumina.infer.generation import Answer, TextStream, generate, stream
from lumina.infer.loading import Loaded, find_checkpoint, load
from lumina.infer.sampling import Sampling

__all__ = [
    "Answer",
    "Loaded",
    "Sampling",
    "TextStream",
    "find_checkpoint",
    "generate",
    "generate_command",
    "load",
    "stream",
]
