"""POST /v1/chat/completions: answer a conversation, as OpenAI's API reference has it ("Chat Completions")."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from lumina.chat import Conversation, Message
from lumina.infer.generation.batch import Token
from lumina.infer.serve.completion import complete
from lumina.infer.serve.endpoint import Endpoint, service_of
from lumina.infer.serve.requests import CompletionOptions, StrictModel
from lumina.infer.serve.responses import Choice, ResponseBuilder, finite_logprob

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Any = None  # ignored
    refusal: None = None  # openai's client sends an answer's empty fields back
    audio: None = None
    annotations: Any = None
    function_call: None = None
    tool_calls: None = None

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(_ROLES[self.role], text)


class ResponseFormat(StrictModel):
    type: Literal["text"]


class ChatRequest(CompletionOptions):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Any = None  # ignored

    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def conversation(self) -> Conversation:
        return Conversation([message.message() for message in self.messages])

    def likeliest(self) -> int | None:
        """How many of the likeliest tokens to report; None: no probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class ChatResponse(ResponseBuilder):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def first_chunks(self, choices: int) -> list[dict[str, Any]]:
        start: dict[str, Any] = {"logprobs": None, "finish_reason": None}
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": index, "delta": delta, **start}]) for index in range(choices)]

    def _choice_body(self, index: int, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": index, "message": message, **self._ending(choice)}

    def _choice_chunk(self, index: int, choice: Choice) -> dict[str, Any]:
        return {"index": index, "delta": {"content": choice.text} if choice.text else {}, **self._ending(choice)}

    def _ending(self, choice: Choice) -> dict[str, Any]:
        logprobs = None
        if self._logprobs:
            logprobs = {"content": [self._entry(token) for token in choice.tokens], "refusal": None}
        return {"logprobs": logprobs, "finish_reason": choice.finish}

    def _entry(self, token: Token) -> dict[str, Any]:
        top = [self._one(other, logprob) for other, logprob in token.top]
        return self._one(token.id, token.logprob) | {"top_logprobs": top}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, raw = self._text(token), self._tokenizer.token_bytes(token)
        unknown = "\ufffd" in text and raw == text.encode()  # a part of a character, whose bytes are not known
        return {"token": text, "logprob": finite_logprob(logprob), "bytes": None if unknown else list(raw)}


async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    conversation = body.conversation()
    ids = await service.tokenized(lambda: service.tokenizer.prompt_ids(conversation), "messages")
    return await complete(service, body, [ids], body.likeliest(), ChatResponse, request)


ENDPOINTS = (Endpoint("POST", "/v1/chat/completions", chat_completions),)
