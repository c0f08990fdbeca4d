"""Commands that use a trained model."""

from __future__ import annotations

from typing import Any

from lumina.commands.common import Arguments, Command, Parser, between, json_option


def generate(arguments: Arguments) -> int:
    """Answer a prompt with a trained model."""
    from lumina.infer import generate_command

    return generate_command(
        run=arguments.resume,
        prompt=arguments.prompt,
        json=arguments.json,
        **_sampling(arguments),
    )


def _generate_options(parser: Parser) -> None:
    parser.add_argument("--resume", required=True, metavar="RUN|CHECKPOINT", help="the trained model")
    parser.add_argument("--prompt", required=True, help="what the user says")
    _sampling_options(parser)
    json_option(parser)


def _sampling_options(parser: Parser) -> None:
    parser.add_argument(
        "--temperature", type=between(float, 0.1, 2.0, 0), default=0.8, help="0.1 to 2.0, or 0 for greedy (0.8)"
    )
    parser.add_argument("--top-k", type=between(int, 1, 100), default=50, help="1 to 100 likeliest tokens (50)")
    parser.add_argument("--top-p", type=between(float, 0.1, 1.0), default=0.9, help="0.1 to 1.0 of the mass (0.9)")
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
    from lumina.infer import chat_command

    return chat_command(
        run=arguments.run,
        system=arguments.system,
        **_sampling(arguments),
    )


def _chat_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN|CHECKPOINT", help="the trained model")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    _sampling_options(parser)


def export(arguments: Arguments) -> int:
    """Write a trained model as a folder that transformers and vLLM load, or as plain safetensors."""
    from lumina.infer import export_command

    return export_command(
        run=arguments.run,
        out=arguments.out,
        dtype=arguments.dtype,
        shard_size=arguments.shard_size,
        form=arguments.format,
        json=arguments.json,
    )


def _export_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN|CHECKPOINT", help="the trained model")
    parser.add_argument("out", metavar="OUT", help="folder to write; it must not hold anything yet")
    formats = (
        "hf: for transformers and vLLM, with tokenizer and chat template, adapters merged; safetensors: weights as "
        "Lumina has them; peft: the adapters alone"
    )
    parser.add_argument("--format", choices=["hf", "safetensors", "peft"], default="hf", help=f"{formats} (hf)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="(float32)")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="largest weight file (5GB)")
    json_option(parser)


def import_(arguments: Arguments) -> int:
    """Take a Llama-shaped Hugging Face model from disk, as a run that other commands use."""
    from lumina.infer import import_command

    return import_command(source=arguments.source, out=arguments.out, json=arguments.json)


def _import_options(parser: Parser) -> None:
    described = "folder with config.json (model_type {FAMILIES}), safetensors and tokenizer.json"
    parser.add_argument("source", metavar="HF_DIR", help=described)
    parser.add_argument("out", metavar="OUT", help="run's folder to write, such as experiments/NAME")
    json_option(parser)


def evaluate(arguments: Arguments) -> int:
    """Measure a model: loss, perplexity and bits per byte on conversations held out, or benchmark tasks."""
    from lumina.infer import evaluate_command

    names = ("run", "data", "tasks", "json", "limit", "fewshot", "batch_size", "chat")
    return evaluate_command(folder=arguments.task_path, **{name: getattr(arguments, name) for name in names})


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
    from lumina.infer import serve_command

    names = ("run", "host", "port", "api_key", "precision", "slots", "queue", "max_tokens", "timeout", "max_body")
    return serve_command(**{name: getattr(arguments, name) for name in names})


def _serve_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN|CHECKPOINT", help="the trained model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=between(int, 0, 65535), default=8000, help="0 takes a free one (8000)")
    parser.add_argument(
        "--api-key", metavar="KEY", help="what clients must show; better LUMINA_API_KEY, which ps hides"
    )
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="(auto)")
    parser.add_argument("--slots", type=between(int, 1, 256), default=8, help="answers made at a time (8)")
    parser.add_argument("--queue", type=between(int, 0, 100_000), default=64, help="answers that may wait (64)")
    parser.add_argument("--max-tokens", type=between(int, 1, 2048), default=2048, help="longest answer (2048)")
    parser.add_argument("--timeout", type=between(float, 1, 86_400), default=300.0, help="seconds for a request (300)")
    parser.add_argument("--max-body", type=between(int, 1024, 1 << 30), default=1 << 20, help="bytes (1 MiB)")


COMMANDS: dict[str, Command] = {
    "generate": Command(generate, _generate_options),
    "chat": Command(chat, _chat_options),
    "serve": Command(serve, _serve_options),
    "evaluate": Command(evaluate, _evaluate_options),
    "export": Command(export, _export_options),
    "import": Command(import_, _import_options),
}
