"""POST /v1/chat/completions: answer a conversation, as OpenAI's API reference has it ("Chat Completions")."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import Request
from pydantic import FailFast, Field, field_validator
from starlette.responses import Response

from lumina.chat import ChatTokenizer, Conversation, ToolCall
from lumina.config import UserError
from lumina.infer.generation.batch import Token
from lumina.infer.generation.constraint import AllOf, BannedTokens, Constraint
from lumina.infer.generation.forms import call_opening
from lumina.infer.serve.completion import Task, check_model, complete
from lumina.infer.serve.endpoint import Endpoint, service_of
from lumina.infer.serve.errors import ApiError
from lumina.infer.serve.requests import (
    TOOLS,
    ChatMessage,
    CompletionOptions,
    NamedTool,
    ResponseFormat,
    StrictModel,
    Tool,
    check_tools,
    conversation_of,
    read_body,
)
from lumina.infer.serve.responses import Choice, ResponseBuilder, finite_logprob
from lumina.infer.serve.service import Service
from lumina.infer.serve.token_texts import TokenTexts


class TemplateSettings(StrictModel):
    enable_thinking: bool | None = None


class ChatRequest(CompletionOptions):
    """POST /v1/chat/completions."""

    no_effect: ClassVar = {
        **CompletionOptions.no_effect,
        "modalities": (["text"],),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "include_reasoning": (True,),
        "separate_reasoning": (True,),
        "verbosity": ("medium",),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "documents": ([],),
        "web_search_options": ({},),
        "stream_reasoning": (True,),
    }
    refused: ClassVar = {
        **CompletionOptions.refused,
        "functions": "is not supported by this server: tools is",
        "function_call": "is not supported by this server: tool_choice is",
        "modalities": "is not supported by this server: it answers with text",
        "audio": "is not supported by this server: it answers with text",
        "continue_final_message": "is not supported by this server: it answers, and does not go on with an answer",
    }

    longest: ClassVar = {"tools": TOOLS}

    messages: Annotated[list[ChatMessage], Field(min_length=1), FailFast()]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], FailFast()] = Field([])
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: TemplateSettings = TemplateSettings()

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _choice(cls, value: Any) -> Any:
        if value in ("none", "auto", "required"):
            return value
        if isinstance(value, dict) and value.get("type") == "function":
            return NamedTool.model_validate(value)
        raise ValueError('takes none, auto, required, or {"type": "function", "function": {"name"}}')

    def limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().limit()

    def conversation(self) -> Conversation:
        """With the tools that may be called: none when tool_choice says so."""
        offered = [] if self.tool_choice == "none" else self.tools
        return conversation_of(self.messages, [tool.text for tool in offered])

    def called(self) -> list[str]:
        """The tools of which one must be called; empty: the model decides."""
        if isinstance(self.tool_choice, NamedTool):
            return [self.tool_choice.function.name]
        return [tool.function.name for tool in self.tools] if self.tool_choice == "required" else []

    def thinking(self) -> bool | None:
        """Whether the answer is to have reasoning; None leaves it to the template. Raises ApiError."""
        asked = self.chat_template_kwargs.enable_thinking
        if self.reasoning_effort == "none":
            if asked:
                text = "reasoning_effort none and chat_template_kwargs.enable_thinking true contradict each other"
                raise ApiError(400, text, param="reasoning_effort")
            return False
        return asked


class ChatResponse(ResponseBuilder):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def first_chunks(self, choices: int) -> list[dict[str, Any]]:
        start: dict[str, Any] = {"logprobs": None, "finish_reason": None}
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": index, "delta": delta, **start}]) for index in range(choices)]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._calls: dict[int, int] = {}  # of each choice, sent so far

    def _choice_body(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls and not choice.text:
            message["content"] = None
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if choice.calls:
            message["tool_calls"] = [_call_body(call) for call in choice.calls]
        return {"index": index, "message": message, **self._ending(index, choice)}

    def _choice_chunk(self, index: int, choice: Choice) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if choice.reasoning:
            delta["reasoning_content"] = choice.reasoning
        if choice.text:
            delta["content"] = choice.text
        if choice.calls:
            first = self._calls.get(index, 0)
            delta["tool_calls"] = [{"index": at, **_call_body(call)} for at, call in enumerate(choice.calls, first)]
        return {"index": index, "delta": delta, **self._ending(index, choice)}

    def _ending(self, index: int, choice: Choice) -> dict[str, Any]:
        logprobs, finish = None, choice.finish
        self._calls[index] = self._calls.get(index, 0) + len(choice.calls)
        if finish == "stop" and self._calls[index]:
            finish = "tool_calls"
        if self._logprobs:
            texts = self._token_texts(index)
            entries = texts.push(choice.tokens, choice.finish is not None)
            content = [self._entry(texts, *entry) for entry in entries]
            logprobs = {"content": content, "refusal": None}
        return {"logprobs": logprobs, "finish_reason": finish}

    def _entry(self, texts: TokenTexts, token: Token, text: str, others: dict[int, str]) -> dict[str, Any]:
        def one(number: int, said: str, logprob: float | None) -> dict[str, Any]:
            return {"token": said, "logprob": finite_logprob(logprob), "bytes": texts.bytes_of(number, said)}

        top = [one(other, others[other], logprob) for other, logprob in token.top]
        return one(token.id, text, token.logprob) | {"top_logprobs": top}


def _call_body(call: ToolCall) -> dict[str, Any]:
    """With an id by which a tool's result can name it: models do not give theirs one."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id or f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service, body = service_of(request), await read_body(request, ChatRequest)
    check_model(service, body.model)
    check_tools(body.tools, body.tool_choice)
    conversation, thinking = body.conversation(), body.thinking()
    schema = None if body.response_format is None else body.response_format.schema_of()
    if schema is not None:
        _check_schema(body, conversation)
        thinking = False
    ids = await service.tokenized(lambda: _prompt_ids(service.tokenizer, conversation, thinking), "messages")
    reader = functools.partial(service.loaded.tokenizer.answer_reader, ids)
    task = Task([ids], reader, body.top_logprobs if body.logprobs else None)
    if not body.parallel_tool_calls:
        task.most_calls = 1
    if names := body.called():
        opening = functools.partial(call_opening, service.tokenizer, conversation, ids, names)
        task.begun = await service.apart(opening, "tool_choice")
    if schema is not None:
        task.constraint = await service.apart(lambda: _held_to(service, ids, schema), "response_format")
    else:
        task.constraint = await service.apart(lambda: _constraint(service, body, thinking), "tools")
    return await complete(service, body, task, ChatResponse, request)


def _constraint(service: Service, body: ChatRequest, thinking: bool | None) -> Callable[[], Constraint] | None:
    """Makes what every answer is held to without a response_format; None: nothing. Raises UserError: schemas of strict
    functions that cannot be kept."""
    makers = list[Callable[[], Constraint]]()
    if banned := _banned(service, body, thinking):
        makers.append(functools.partial(BannedTokens, banned, service.loaded.config.vocab_size))
    if body.tool_choice != "none" and any(tool.function.strict for tool in body.tools):
        makers.append(_strict_calls(service, body.tools))
    return None if not makers else lambda: AllOf([make() for make in makers])


def _strict_calls(service: Service, tools: Sequence[Tool]) -> Callable[[], Constraint]:
    """Raises UserError."""
    if service.call_tokens is None:
        raise UserError("strict functions: this model's template writes calls in a form that no schema can be kept in")
    functions = [tool.function for tool in tools]
    schemas = {one.name: one.parameters if one.strict else None for one in functions}
    return service.grammars.calls(
        service.call_tokens, {name: schema or {"type": "object"} for name, schema in schemas.items()}
    )


def _banned(service: Service, body: ChatRequest, thinking: bool | None) -> frozenset[int]:
    """The tokens that begin what the request does not want."""
    calling = service.calling_tokens if body.tools and body.tool_choice == "none" else frozenset[int]()
    return calling | (service.reasoning_tokens if thinking is False else frozenset[int]())


def _prompt_ids(tokenizer: ChatTokenizer, conversation: Conversation, thinking: bool | None) -> list[int]:
    """Raises UserError; ApiError where it is the tools that the template does not take."""
    try:
        return tokenizer.prompt_ids(conversation, thinking)
    except UserError as error:
        if conversation.tools:
            tokenizer.prompt_ids(Conversation(conversation.messages), thinking)
            raise ApiError(400, str(error), param="tools") from None
        raise


def _held_to(service: Service, prompt: list[int], schema: dict[str, Any]) -> Callable[[], Constraint]:
    """Raises UserError: a schema that cannot be kept, or a template that opens every answer with reasoning."""
    reader = service.tokenizer.answer_reader(prompt)
    said = [*(reader.push(token) for token in service.tokenizer.encode("{}")), reader.end()]
    if "".join(delta.content for delta in said).strip() != "{}":
        raise UserError("this model's template begins every answer with reasoning, and a schema allows none")
    return service.grammars.json(schema)


def _check_schema(body: ChatRequest, conversation: Conversation) -> None:
    """Raise ApiError when the request asks for something that an answer in JSON cannot have."""
    if conversation.tools:
        text = "response_format and tools cannot be had together: leave one out, or set tool_choice to none"
        raise ApiError(400, text, param="response_format")
    if body.chat_template_kwargs.enable_thinking:
        text = "response_format and reasoning cannot be had together: the schema is kept from the first token on"
        raise ApiError(400, text, param="response_format")


ENDPOINTS = (Endpoint("POST", "/v1/chat/completions", chat_completions),)
