"""The commands of this room: use a trained model, print for a reader or as JSON, return the exit code."""

from __future__ import annotations

import json as json_module
import logging
import os
import sys
import time
from collections import Counter
from typing import Any

from lumina.chat import Conversation, Message
from lumina.config import UserError
from lumina.infer.evaluation.loss import evaluate, read_conversations, table
from lumina.infer.generation.generate import Answer, printable, stream_text
from lumina.infer.generation.sampling import Sampling
from lumina.infer.hf.exporting import export
from lumina.infer.hf.importing import import_hf
from lumina.infer.loading import find_checkpoint, load, read_config, tokenizer_folder
from lumina.infer.repl import Chat, converse

log = logging.getLogger("lumina")


def generate_command(
    *,
    run: str,
    prompt: str,
    json: bool = False,
    **settings: Any,
) -> int:
    """Answer one prompt, printing as the answer arrives. `settings` are Sampling's. Raises UserError."""
    sampling = Sampling(**settings)
    loaded = load(run)
    log.info("%s, step %d", loaded.checkpoint, loaded.step)
    ids = loaded.tokenizer.prompt_ids(Conversation([Message("user", prompt)]))
    answer = Answer()
    safe = printable if sys.stdout.isatty() else str
    started = time.perf_counter()
    for piece in stream_text(loaded.model, loaded.tokenizer, ids, sampling, answer):
        if not json:
            sys.stdout.write(safe(piece))
            sys.stdout.flush()
    seconds = time.perf_counter() - started
    if not json:
        print()
        if answer.finish == "window":
            log.warning("the answer ends here because the model's window (%d tokens) is full", loaded.config.seq_length)
        return 0
    result = {
        "text": answer.text,
        "finish_reason": answer.finish,
        "prompt_tokens": len(ids),
        "tokens": len(answer.ids),
        "seconds": round(seconds, 4),
        "seed": sampling.seed,
        "checkpoint": str(loaded.checkpoint),
        "step": loaded.step,
    }
    print(json_module.dumps(result, ensure_ascii=False))
    return 0


def export_command(*, run: str, out: str, dtype: str, shard_size: str, form: str = "hf", json: bool = False) -> int:
    """Write a Hugging Face folder, or plain safetensors. Raises UserError."""
    exported = export(run, out, dtype, shard_size, form)
    facts = {
        "folder": str(exported.folder),
        "files": exported.shards,
        "bytes": exported.bytes,
        "format": form,
        "dtype": dtype,
        "checkpoint": str(exported.checkpoint),
    }
    if json:
        print(json_module.dumps(facts, ensure_ascii=False))
    else:
        files = f"{len(exported.shards)} weight file" + ("s" if len(exported.shards) > 1 else "")
        print(f"{exported.checkpoint} -> {exported.folder}: {files}, {exported.bytes / 1e6:.1f} MB in {dtype}")
    return 0


def import_command(*, source: str, out: str, json: bool = False) -> int:
    """Turn a Hugging Face folder into a run. Raises UserError."""
    folder = import_hf(source, out)
    checkpoint = find_checkpoint(folder)
    config, own = read_config(checkpoint), tokenizer_folder(checkpoint) is None
    facts = {"folder": str(folder), "parameters": config.num_parameters(), "lumina_tokenizer": own}
    if json:
        print(json_module.dumps(facts, ensure_ascii=False))
    else:
        whose = "Lumina's tokenizer" if own else "its own tokenizer and chat template"
        print(f"{source} -> {folder}: {config.num_parameters() / 1e6:.1f}M parameters, {whose}")
    return 0


def chat_command(
    *,
    run: str,
    system: str | None = None,
    **settings: Any,
) -> int:
    """Talk to a model in the terminal until /quit or the end of input. `settings` are Sampling's. Raises UserError."""
    sampling = Sampling(**settings)
    loaded = load(run)
    chat = Chat(loaded.model, loaded.tokenizer, sampling, system)
    return converse(chat, f"{loaded.checkpoint}, step {loaded.step}")


def evaluate_command(
    *, run: str, data: list[str] | None, tasks: list[str] | None = None, json: bool = False, **asked: Any
) -> int:
    """Score a model on conversations, or on tasks of lm-evaluation-harness (`asked`: run_tasks'). Raises UserError."""
    if not data and not tasks:
        raise UserError("nothing to evaluate on", "Give --data FILE … (conversations), --tasks NAME …, or both.")
    if tasks:
        try:
            from lumina.infer.evaluation.tasks import run_tasks, task_table
        except ModuleNotFoundError as error:
            raise UserError(
                f"tasks need {error.name}, which is not installed", "Install it with `pip install 'lumina[tasks]'`."
            ) from None
    loaded = load(run)
    log.info("%s, step %d", loaded.checkpoint, loaded.step)
    facts: dict[str, Any] = {"checkpoint": str(loaded.checkpoint), "step": loaded.step}
    lines = []
    if data:
        skipped: Counter[str] = Counter()
        result = evaluate(loaded, read_conversations(data, skipped))
        result.skipped = skipped
        if not result.turns:
            raise UserError(
                "there is no assistant message to evaluate on", f"Skipped records: {dict(skipped) or 'none'}."
            )
        facts |= result.to_dict()
        cut = f", cut at the window in {result.cut:,} places" if result.cut else ""
        lines += [table(result), f"{result.conversations:,} conversations{cut}"]
        lines += [f"skipped, {reason}: {count:,}" for reason, count in sorted(skipped.items())]
    if tasks:
        facts["tasks"] = run_tasks(loaded, tasks, **asked)
        lines.append(task_table(facts["tasks"]))
    print(json_module.dumps(facts, ensure_ascii=False, default=str) if json else "\n".join(lines))
    return 0


def serve_command(*, run: str, api_key: str | None, **options: Any) -> int:
    """Serve a model over HTTP until SIGTERM or SIGINT. Raises UserError."""
    try:
        from lumina.infer.serve.server import serve
    except ModuleNotFoundError as error:
        raise UserError(
            f"serving needs {error.name}, which is not installed", "Install it with `pip install 'lumina[serve]'`."
        ) from None
    return serve(run, os.environ.get("LUMINA_API_KEY") if api_key is None else api_key, **options)
