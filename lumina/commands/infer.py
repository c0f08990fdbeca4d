"""Commands that use a trained model."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina.commands.checks import trained_model
from lumina.commands.common import Arguments, Command, Parser, between, json_option, print_json
from lumina.files import read_json
from lumina.terminal import json_line, printable, say

if TYPE_CHECKING:
    from lumina.chat import AnswerDelta
    from lumina.infer import Answer, Loaded

log = logging.getLogger("lumina")


def generate(arguments: Arguments) -> int:
    """Answer a prompt with a trained model."""
    run = trained_model(_one_run(arguments))
    tools = _tools(arguments)
    from lumina.chat import Conversation, Message
    from lumina.infer import Answer, Sampling, load, stream_answer

    sampling = Sampling(**_sampling(arguments))
    loaded = load(run)
    log.info("%s, step %d", loaded.checkpoint, loaded.step)
    conversation = Conversation([Message("user", arguments.prompt)], tools=tools)
    ids = loaded.tokenizer.prompt_ids(conversation, arguments.thinking)
    answer = Answer()
    started = time.perf_counter()
    deltas = stream_answer(loaded.model, loaded.tokenizer, ids, sampling, answer, arguments.thinking)
    if not arguments.json:
        _print_answer(deltas, answer)
        if answer.finish == "window":
            log.warning("the answer ends here because the model's context (%d tokens) is full", loaded.context_length)
        return 0
    for _ in deltas:
        pass
    calls = [{"name": call.name, "arguments": call.arguments} for call in answer.tool_calls]
    said = {"reasoning": answer.reasoning} if answer.reasoning else {}
    print_json(
        {
            "text": answer.text,
            **said,
            **({"tool_calls": calls} if calls else {}),
            "finish_reason": answer.finish,
            "prompt_tokens": len(ids),
            "tokens": len(answer.ids),
            "seconds": round(time.perf_counter() - started, 4),
            "seed": sampling.seed,
            "checkpoint": str(loaded.checkpoint),
            "step": loaded.step,
        }
    )
    return 0


def _tools(arguments: Arguments) -> tuple[str, ...]:
    """The tools of --tools, read before the model is loaded. Raises UserError."""
    if arguments.tools is None:
        return ()
    from lumina.infer import read_tools

    return tuple(read_tools(Path(arguments.tools)))


def _print_answer(deltas: Iterable[AnswerDelta], answer: Answer) -> None:
    """As it arrives. On a terminal the reasoning is dimmed; elsewhere it goes to stderr, so that stdout has the answer
    and its tool calls alone, a line of JSON each."""

    terminal = sys.stdout.isatty()
    for delta in deltas:
        if delta.reasoning and terminal:
            sys.stdout.write(f"\x1b[2m{printable(delta.reasoning)}\x1b[0m")
        elif delta.reasoning:
            sys.stderr.write(delta.reasoning)
        sys.stdout.write(printable(delta.content) if terminal else delta.content)
        sys.stdout.flush()
    if answer.text or not answer.tool_calls:
        say()
    for call in answer.tool_calls:
        print_json({"tool_call": {"name": call.name, "arguments": call.arguments}})


def _one_run(arguments: Arguments) -> str:
    """The run that `generate` is given, as a word or, as the early README has it, with --resume."""
    from lumina.config import UserError

    given = [run for run in (arguments.run, arguments.resume) if run is not None]
    if len(given) != 1:
        raise UserError("which model is to answer?", "Give one: lumina generate RUN --prompt TEXT.")
    return str(given[0])


def _generate_options(parser: Parser) -> None:
    parser.add_argument("run", nargs="?", metavar="RUN|CHECKPOINT", help="the trained model")
    parser.add_argument("--resume", metavar="RUN|CHECKPOINT", help="the same, as the early README has it")
    parser.add_argument("--prompt", required=True, help="what the user says")
    _sampling_options(parser)
    _answer_options(parser)
    json_option(parser)


def _answer_options(parser: Parser) -> None:
    parser.add_argument(
        "--tools", metavar="FILE", help="tools that the model may call: a JSON list as OpenAI's API has it"
    )
    parser.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="ask for reasoning before the answer, or for none (as the model's template has it)",
    )


def _sampling_options(parser: Parser) -> None:
    parser.add_argument("--temperature", type=between(float, 0.0, 2.0), default=0.8, help="0 (greedy) to 2.0 (0.8)")
    parser.add_argument("--top-k", type=between(int, 1, 10**9), default=50, help="so many likeliest tokens (50)")
    parser.add_argument("--top-p", type=between(float, 0.0, 1.0), default=0.9, help="0 to 1.0 of the mass (0.9)")
    parser.add_argument("--max-length", type=between(int, 1, 2048), default=256, help="new tokens, 1 to 2048 (256)")
    parser.add_argument("--seed", type=int, default=None, help="same seed, same answer")
    parser.add_argument(
        "--min-p", type=between(float, 0, 1), default=0.0, help="at least this share of the likeliest, 0 to 1 (0)"
    )
    parser.add_argument(
        "--repetition-penalty", type=between(float, 0.5, 2.0), default=1.0, help="0.5 to 2.0; above 1 repeats less (1)"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be repeated")


def _sampling(arguments: Arguments) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "max_length", "seed", "min_p", "repetition_penalty")
    return {name: getattr(arguments, name) for name in names} | {"stop": tuple(arguments.stop)}


def chat(arguments: Arguments) -> int:
    """Talk to a trained model in the terminal."""
    run = trained_model(arguments.run)
    _tools(arguments)
    from lumina.infer import Chat, Sampling, converse, load

    sampling = Sampling(**_sampling(arguments))
    loaded = load(run)
    session = Chat(loaded.model, loaded.tokenizer, sampling, arguments.system, thinking=arguments.thinking)
    if arguments.tools is not None:
        session.load_tools(Path(arguments.tools))
    return converse(session, f"{loaded.checkpoint}, step {loaded.step}")


def _chat_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN|CHECKPOINT", help="the trained model")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    _sampling_options(parser)
    _answer_options(parser)


def export(arguments: Arguments) -> int:
    """Write a trained model as a folder that transformers and vLLM load, or as plain safetensors."""
    from lumina.infer import check_new_folder, parse_size

    parse_size(arguments.shard_size)
    check_new_folder(Path(arguments.out))
    run = trained_model(arguments.run)
    from lumina.infer import export as write

    written = write(run, arguments.out, arguments.dtype, arguments.shard_size, arguments.format)
    if arguments.json:
        print_json(
            {
                "folder": str(written.folder),
                "files": written.shards,
                "bytes": written.bytes,
                "format": arguments.format,
                "dtype": arguments.dtype,
                "checkpoint": str(written.checkpoint),
            }
        )
    else:
        files = f"{len(written.shards)} weight file" + ("s" if len(written.shards) > 1 else "")
        size = f"{written.bytes / 1e6:.1f} MB in {arguments.dtype}"
        say(f"{written.checkpoint} -> {written.folder}: {files}, {size}")
    return 0


def _export_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN|CHECKPOINT", help="the trained model")
    parser.add_argument("out", metavar="OUT", help="folder to write; it must not hold anything yet")
    formats = (
        "hf: for transformers and vLLM, with tokenizer and chat template, adapters merged; safetensors: weights as "
        "Lumina has them; peft: the adapters alone; gguf: one file for llama.cpp"
    )
    parser.add_argument("--format", choices=["hf", "safetensors", "peft", "gguf"], default="hf", help=f"{formats} (hf)")
    dtypes = ["float32", "bfloat16", "float16", "q8_0"]
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="q8_0: gguf alone (float32)")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="largest weight file (5GB)")
    json_option(parser)


def import_(arguments: Arguments) -> int:
    """Take a Llama-shaped Hugging Face model from disk, as a run that other commands use."""
    from lumina.infer import check_new_folder, check_source, find_template

    check_new_folder(Path(arguments.out))
    check_source(Path(arguments.source))
    if arguments.chat_template is not None:
        find_template(arguments.chat_template)
    log.info("importing %s", arguments.source)
    from lumina.infer import IMPORT_RECORD, find_checkpoint, import_hf, read_config, tokenizer_folder

    folder = import_hf(
        arguments.source,
        arguments.out,
        chat_template=arguments.chat_template,
        grow_vocabulary=arguments.grow_vocabulary,
        context_length=arguments.context_length,
    )
    checkpoint = find_checkpoint(folder)
    config, own = read_config(checkpoint), tokenizer_folder(checkpoint) is None
    if arguments.json:
        notes = read_json(folder / IMPORT_RECORD)["notes"]
        facts = {"folder": str(folder), "parameters": config.num_parameters(), "lumina_tokenizer": own, "notes": notes}
        print_json(facts)
    else:
        whose = "Lumina's tokenizer" if own else "its own tokenizer and chat template"
        say(f"{arguments.source} -> {folder}: {config.num_parameters() / 1e6:.1f}M parameters, {whose}")
    return 0


def _import_options(parser: Parser) -> None:
    described = "folder with config.json (model_type {FAMILIES}), safetensors and tokenizer.json"
    parser.add_argument("source", metavar="HF_DIR", help=described)
    parser.add_argument("out", metavar="OUT", help="run's folder to write, such as experiments/NAME")
    parser.add_argument(
        "--chat-template",
        metavar="NAME|FILE",
        help="for a base model that brings none: chatml, llama3, mistral, zephyr or a Jinja file",
    )
    parser.add_argument(
        "--grow-vocabulary",
        action="store_true",
        help="rows for ids that the tokenizer has beyond the embedding, each the mean of the others",
    )
    parser.add_argument(
        "--context-length", type=between(int, 2, 10**9), metavar="N", help="a shorter one, such as the sliding window"
    )
    json_option(parser)


def evaluate(arguments: Arguments) -> int:
    """Measure a model: loss, perplexity and bits per byte on conversations held out, or benchmark tasks."""
    from lumina.config import UserError

    if not arguments.data and not arguments.tasks:
        raise UserError("nothing to evaluate on", "Give --data FILE … (conversations), --tasks NAME …, or both.")
    if arguments.data:
        from lumina.data import check_inputs

        check_inputs(arguments.data)
    run = trained_model(arguments.run)
    if arguments.tasks:
        _require("lm_eval", "tasks need", "tasks")
    from lumina.infer import load

    loaded = load(run)
    log.info("%s, step %d", loaded.checkpoint, loaded.step)
    facts: dict[str, Any] = {"checkpoint": str(loaded.checkpoint), "step": loaded.step}
    lines = []
    if arguments.data:
        measured, text = _evaluate_data(loaded, arguments.data)
        facts |= measured
        lines += text
    if arguments.tasks:
        from lumina.infer.evaluation.tasks import run_tasks, task_table

        names = ("limit", "fewshot", "batch_size", "chat")
        asked = {name: getattr(arguments, name) for name in names}
        facts["tasks"] = run_tasks(loaded, arguments.tasks, folder=arguments.task_path, **asked)
        lines.append(task_table(facts["tasks"]))
    say(json_line(facts, default=str) if arguments.json else "\n".join(lines))
    return 0


def _require(module: str, what: str, extra: str) -> None:
    """Raise UserError before the model is loaded when a package of an extra is missing."""
    from lumina.config import UserError, install_command

    try:
        import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what} {error.name}, which is not installed", f"Install it: {install_command(extra)}"
        ) from None


def _evaluate_data(loaded: Loaded, files: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What is measured on conversations, and the same for a reader. Raises UserError."""
    from lumina.config import UserError
    from lumina.infer import evaluate as measure
    from lumina.infer import evaluation_table, read_conversations

    skipped: Counter[str] = Counter()
    result = measure(loaded, read_conversations(files, skipped))
    result.skipped = skipped
    if not result.turns:
        raise UserError("there is no assistant message to evaluate on", f"Skipped records: {dict(skipped) or 'none'}.")
    cut = f", cut at the context length in {result.cut:,} places" if result.cut else ""
    lines = [evaluation_table(result), f"{result.conversations:,} conversations{cut}"]
    lines += [f"skipped, {reason}: {count:,}" for reason, count in sorted(skipped.items())]
    return result.to_dict(), lines


def _evaluate_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN|CHECKPOINT", help="the trained model")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="conversations, as train reads them")
    parser.add_argument(
        "--tasks", nargs="+", metavar="NAME|FILE", help="tasks of lm-evaluation-harness, or task files (.yaml)"
    )
    parser.add_argument("--task-path", metavar="DIR", help="a folder of more task files")
    parser.add_argument("--limit", type=between(int, 1, 10**9), metavar="N", help="only the first N items of each task")
    parser.add_argument("--fewshot", type=between(int, 0, 1000), metavar="N", help="examples before each (the task's)")
    parser.add_argument("--batch-size", type=between(int, 1, 4096), default=16, help="requests at a time (16)")
    parser.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    json_option(parser)


def serve(arguments: Arguments) -> int:
    """Answer over HTTP: OpenAI's API, and a chat page for the browser."""
    run = trained_model(arguments.run)
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        _require(module, "serving needs", "serve")
    from lumina.infer.serve import serve as run_server

    key = os.environ.get("LUMINA_API_KEY") if arguments.api_key is None else arguments.api_key
    names = ["host", "port", "precision", "slots", "queue", "max_tokens", "timeout", "max_body"]
    names += ["prefix_cache", "prefix_cache_bytes", "context_length"]
    return run_server(str(run), key, **{name: getattr(arguments, name) for name in names})


def _serve_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN|CHECKPOINT", help="the trained model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=between(int, 0, 65535), default=8000, help="0 takes a free one (8000)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="what clients must show. Prefer LUMINA_API_KEY; flags are visible in ps.",
    )
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="(auto)")
    parser.add_argument("--slots", type=between(int, 1, 256), default=8, help="answers made at a time (8)")
    parser.add_argument("--queue", type=between(int, 0, 100_000), default=64, help="answers that may wait (64)")
    parser.add_argument("--max-tokens", type=between(int, 1, 2048), default=2048, help="longest answer (2048)")
    parser.add_argument("--timeout", type=between(float, 1, 86_400), default=300.0, help="seconds for a request (300)")
    kept = "conversations whose keys and values are kept for their next turn, 0 for none (32)"
    parser.add_argument("--prefix-cache", type=between(int, 0, 100_000), default=32, metavar="N", help=kept)
    size = "of all of these at most (1 GiB)"
    parser.add_argument("--prefix-cache-bytes", type=between(int, 0, 1 << 50), default=1 << 30, metavar="B", help=size)
    parser.add_argument(
        "--context-length",
        type=between(int, 2, 1 << 30),
        metavar="N",
        help="tokens of a prompt and its answer (the model's; less where half of the free memory holds less)",
    )
    parser.add_argument("--max-body", type=between(int, 1024, 1 << 30), default=1 << 20, help="bytes (1 MiB)")


COMMANDS: dict[str, Command] = {
    "generate": Command(generate, _generate_options),
    "chat": Command(chat, _chat_options),
    "serve": Command(serve, _serve_options),
    "evaluate": Command(evaluate, _evaluate_options),
    "export": Command(export, _export_options),
    "import": Command(import_, _import_options),
}
