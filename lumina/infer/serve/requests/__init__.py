"""Request bodies of the completion endpoints as OpenAI's API reference has them: checked, and as Lumina's types."""

from lumina.infer.serve.requests.messages import ChatMessage, conversation_of
from lumina.infer.serve.requests.options import CHOICES, CompletionOptions
from lumina.infer.serve.requests.reading import parse_body, read_body
from lumina.infer.serve.requests.response_format import ResponseFormat
from lumina.infer.serve.requests.strict import StrictModel
from lumina.infer.serve.requests.tools import TOOLS, NamedTool, Tool, check_tools

__all__ = [
    "CHOICES",
    "TOOLS",
    "ChatMessage",
    "CompletionOptions",
    "NamedTool",
    "ResponseFormat",
    "StrictModel",
    "Tool",
    "check_tools",
    "conversation_of",
    "parse_body",
    "read_body",
]
