"""Lumina from Python: the functions behind the commands, with their results as objects. docs/api.md shows each.

    from lumina import generate, load_config, train

    config = load_config("nano", train_data=["conversations.jsonl"], max_steps=100)
    run = train(config)
    print(generate(run.folder, "Hello!").text)

Users' mistakes raise `UserError`, whose text says what to do; nothing here prints or exits. torch is imported by the
functions that need it, when they are called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina.config import Config, UserError, load

if TYPE_CHECKING:
    from lumina.data import PackedDataset
    from lumina.infer import Answer, Loaded
    from lumina.train import train

__all__ = ["evaluate", "export", "generate", "import_model", "load_config", "load_model", "prepare", "train"]

Run = str | PathLike[str]  # a run's folder or a checkpoint, as the commands take them
Message = Mapping[str, Any]  # {"role": "user", "content": "…"}


def load_config(preset_or_yaml: str = "medium", **settings: Any) -> Config:
    """A configuration: a preset or a YAML file of flat keys, and settings by key over it. Raises UserError for an
    unknown key (with a did-you-mean) and a value out of its bounds."""
    return load(preset_or_yaml, settings)


def prepare(config: Config) -> tuple[PackedDataset, PackedDataset | None]:
    """The training and the evaluation set that `config` names, tokenised, masked and packed, from the cache where it
    is. `account_lines()` of each says what became of every line, message and token."""
    from lumina.chat import open_tokenizer
    from lumina.data import prepare_splits

    return prepare_splits(config, open_tokenizer(config.tokenizer, config.chat_template))


def load_model(run: Run, precision: str = "auto") -> Loaded:
    """A trained model in memory, with its tokenizer. `generate` takes it in place of a run, so that it is read once."""
    from lumina.infer import load as load_run

    return load_run(Path(run), precision)


def generate(
    model: Run | Loaded,
    prompt: str | Sequence[Message],
    *,
    system: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: bool | None = None,
    **sampling: Any,
) -> Answer:
    """The model's answer to a prompt, or to a conversation that ends with a message of the user's or a tool's result.

    Messages are those of OpenAI's API: `role`, `content`, and of an assistant's `reasoning_content` and `tool_calls`,
    of a tool's `tool_call_id` and `name`. tools: as there too, `{"type": "function", "function": {…}}`. thinking: with
    or without reasoning, where the template knows how. sampling: temperature, top_k, top_p, min_p, repetition_penalty,
    max_length, seed, stop, as `lumina generate` has them. The answer's `text`, `reasoning`, `tool_calls`, `ids` and
    `finish` ("stop", "length" or "window").
    """
    from lumina.chat import Conversation
    from lumina.chat import Message as ChatMessage
    from lumina.infer import Sampling, message_of, tool_texts
    from lumina.infer import generate as answer_all

    loaded = load_model(model) if isinstance(model, str | PathLike) else model
    try:
        messages = [ChatMessage("user", prompt)] if isinstance(prompt, str) else [message_of(one) for one in prompt]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"a message is not as OpenAI's API has it: {type(error).__name__}: {error}") from None
    if system is not None:
        messages = [ChatMessage("system", system), *messages]
    if not messages or messages[-1].role not in ("user", "tool"):
        raise UserError("a conversation to be answered ends with a message of the user's or a tool's result")
    prompts = [loaded.tokenizer.prompt_ids(Conversation(messages, tools=tool_texts(tools)), thinking)]
    return answer_all(loaded.model, loaded.tokenizer, prompts, Sampling(**sampling), thinking)[0]


def evaluate(model: Run | Loaded, files: Sequence[str]) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of the assistant's messages in `files`, keyed as `lumina evaluate --json`."""
    from lumina.infer import evaluate as evaluate_all
    from lumina.infer import read_conversations

    skipped: Counter[str] = Counter()
    loaded = load_model(model) if isinstance(model, str | PathLike) else model
    result = evaluate_all(loaded, read_conversations(files, skipped))
    result.skipped = skipped
    return result.to_dict()


def export(run: Run, out: Run, *, dtype: str = "float32", shard_size: str = "5GB", form: str = "hf") -> Path:
    """Write a model as a folder that transformers and vLLM load (`hf`), as plain safetensors (`safetensors`), its
    adapters alone (`peft`), or a GGUF file for llama.cpp (`gguf`); returns the folder."""
    from lumina.infer import export as export_run

    return export_run(Path(run), Path(out), dtype, shard_size, form).folder


def import_model(
    source: Run,
    out: Run,
    *,
    chat_template: str | None = None,
    grow_vocabulary: bool = False,
    context_length: int | None = None,
) -> Path:
    """Take a Hugging Face folder as a run, for `init_from`, `generate` and the rest; returns the run's folder. The
    options are those of `lumina import`."""
    from lumina.infer import import_hf

    return import_hf(
        str(source),
        str(out),
        chat_template=chat_template,
        grow_vocabulary=grow_vocabulary,
        context_length=context_length,
    )
