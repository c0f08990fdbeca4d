"""The commands of this room: use a trained model, print for a reader or as JSON, return the exit code."""

from __future__ import annotations

import json as json_module
import logging
import sys
import time

from lumina.chat import Conversation, Message, prompt_ids
from lumina.infer.generation import Answer, TextStream, stream
from lumina.infer.loading import load
from lumina.infer.sampling import Sampling

log = logging.getLogger("lumina")


def generate_command(
    *,
    run: str,
    prompt: str,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 0.9,
    max_length: int = 256,
    seed: int | None = None,
    json: bool = False,
) -> int:
    """Answer one prompt, printing as the answer arrives. Raises UserError."""
    sampling = Sampling(temperature, top_k, top_p, max_length, seed)
    loaded = load(run)
    log.info("%s, step %d", loaded.checkpoint, loaded.step)
    ids = prompt_ids(loaded.tokenizer, Conversation([Message("user", prompt)]))
    answer, text, pieces = Answer(), TextStream(loaded.tokenizer), []
    started = time.perf_counter()
    for ((_, token),) in stream(loaded.model, loaded.tokenizer, [ids], sampling):
        if token == loaded.tokenizer.stop_id:
            answer.finish = "stop"
            break
        answer.ids.append(token)
        pieces.append(text.push(token))
        if not json:
            sys.stdout.write(pieces[-1])
            sys.stdout.flush()
    seconds = time.perf_counter() - started
    pieces.append(text.end())
    if answer.finish is None:
        answer.finish = "length" if len(answer.ids) == max_length else "window"
    if not json:
        print(pieces[-1])
        if answer.finish == "window":
            log.warning("the answer ends here because the model's window (%d tokens) is full", loaded.config.seq_length)
        return 0
    result = {
        "text": "".join(pieces),
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
