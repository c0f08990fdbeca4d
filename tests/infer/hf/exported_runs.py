"""Runs of every kind that an export must speak for, and what `lumina generate` and transformers say of them.

python -m tests.infer.hf.exported_runs [--train]     the table, over 20 prompts; --train: runs that were trained
python -m tests.infer.hf.exported_runs --checks      families against transformers: logits, training, files, decoding
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from lumina.chat import Conversation, Message
from lumina.config import LoraConfig
from lumina.infer import Loaded, Sampling, export, generate, import_hf, load
from tests.infer.adapters import adapt, write_adapters
from tests.infer.hf.family_checks import check
from tests.infer.hf_models import make_hf
from tests.infer.small_models import make_model, write_run
from tests.runs import clean_environment, write_conversations

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Of the tests."""
NEWER = ("gemma2", "gemma3_text", "granite", "olmo2", "phi3", "smollm3")
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"count": 4},
    "qwen3_moe": {"count": 4, "size": 24},
    "olmoe": {"count": 4, "norm_topk_prob": False},
}
"""Families of experts, and the settings of those in the runs of our own."""
KINDS = ("own", "foreign", "base", "lora")
"""own: Lumina's tokenizer and template. foreign: an imported model's. base: an imported model that came without a
template, with another end of text, and was given one. lora: adapters over a foreign one, merged."""
PROMPTS = [
    "Hello",
    "hello there, how are you today?",
    "Who are you?",
    "my sister makes me happy",
    "  two spaces,\n\na blank line ",
    "1 + 2 = ?",
    "Das Wetter könnte besser sein.",
    "日本語で話そう",
    "🙂🙃",
    "a",
    "<|im_end|",
    "def f(x):\n\treturn x",
    "the old library",
    "Funny, but your garden",
    "...",
    "To be fair, that film reminds me of home. I think the old library is worth the wait.",
    "<think>",
    "YESTERDAY I said that",
    "user",
    "\u200bzero width",
]
LENGTH = 24  # new tokens at most
STOP_WEIGHT = 2.0  # rows of the stop tokens are so much longer: random answers end now and then


class Said(NamedTuple):
    """An answer's text, and whether it ended with a stop token."""

    text: str
    stopped: bool


def make_run(folder: Path, family: str, kind: str) -> Path:
    """A run with random weights."""
    if kind == "own":
        from lumina.chat import Tokenizer

        shape: dict[str, Any] = {"family": family, "experts": EXPERTS.get(family)}
        model = make_model(seed=4, tie_word_embeddings=False, init_std=0.3, num_layers=1, **shape)

        model.output.weight[Tokenizer.load().stop_id] *= 1.3 * STOP_WEIGHT  # one of a hundred thousand
        return write_run(folder / "run", model)
    source = folder / "hf"
    make_hf(source, {"llama": "tinyllama"}.get(family, family))
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][:3] *= STOP_WEIGHT  # <|endoftext|>, <|im_start|>, <|im_end|>
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    run = import_hf(source, folder / "run", chat_template=make_base(source) if kind == "base" else None)
    if kind != "lora":
        return run
    settings = LoraConfig(lora_rank=3, **targets(family))
    adapted = write_adapters(folder / "adapted", run, adapt(load(run, precision="fp32").model, settings), settings)
    shutil.copytree(run / "tokenizer", adapted / "tokenizer", dirs_exist_ok=True)
    return adapted


def targets(family: str) -> dict[str, Any]:
    """Settings of adapters: experts get none."""
    return {"lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"]} if family in EXPERTS else {}


def make_base(source: Path) -> str:
    """Turn a chat model's folder into a base model's; returns the template to import it with."""
    (source / "chat_template.jinja").unlink()
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    generation = {"eos_token_id": 0, "do_sample": True, "temperature": 0.6, "repetition_penalty": 1.3, "max_length": 9}
    (source / "generation_config.json").write_text(json.dumps(generation))
    return "chatml"


def lumina_says(loaded: Loaded, prompts: Sequence[str]) -> list[Said]:
    """As `lumina generate --temperature 0` in float32."""
    answers = []
    for prompt in prompts:
        ids = loaded.tokenizer.prompt_ids(Conversation([Message("user", prompt)]))
        answer = generate(loaded.model, loaded.tokenizer, [ids], Sampling(temperature=0, max_length=LENGTH))[0]
        answers.append(Said(answer.text, answer.finish == "stop"))
    return answers


def transformers_says(folder: Path, prompts: Sequence[str]) -> list[Said]:
    """As its documentation has it: template, generate and decode, with nothing but the export's own files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    answers = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            said = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
        new = said[0, inputs["input_ids"].shape[1] :].tolist()
        answers.append(Said(tokenizer.decode(new, skip_special_tokens=True), new[-1] in ends))
    return answers


# --- Trained runs ---------------------------------------------------------------------------------


def train_run(folder: Path, family: str, kind: str) -> Path:
    """The same kinds by `lumina train`: from nothing, and from imports."""
    import subprocess
    import sys

    data = write_conversations(folder / "train.jsonl", 60, seed=3)
    settings: dict[str, Any] = {"max_steps": 80, "batch_size": 8, "learning_rate": 1e-2, "precision": "fp32"}
    words: list[str] = []
    if kind == "own":
        settings |= {"family": family, "max_steps": 15, "batch_size": 4}
        settings |= {"experts": json.dumps(EXPERTS[family])} if family in EXPERTS else {}
    else:
        make_hf(folder / "hf", {"llama": "tinyllama"}.get(family, family))
        template = make_base(folder / "hf") if kind == "base" else None
        words = ["--init-from", str(import_hf(folder / "hf", folder / "imported", chat_template=template))]
        if kind == "lora":
            settings |= {"lora_rank": 8} | {name: json.dumps(value) for name, value in targets(family).items()}
    line = ["--config", "nano", "--train-data", str(data), "--output-dir", str(folder), "--experiment-name", "run"]
    line += [*words, *(word for name, value in settings.items() for word in ("--set", f"{name}={value}"))]
    command = [sys.executable, "-P", "-m", "lumina.cli", "train", *line]
    subprocess.run(command, check=True, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / "run"


def print_checks(families: Sequence[str]) -> int:
    """Largest differences from transformers; 1 where one is out of bounds."""
    wrong = 0
    print(f"{'family':<14}{'logits':>10}{'20 steps':>10}{'decoding':>10}{'tensors changed':>17}")
    for family in families:
        with tempfile.TemporaryDirectory() as place:
            found = check(Path(place), {"llama": "tinyllama"}.get(family, family))
        wrong += found.logits >= 1e-5 or found.losses >= 1e-4 or found.decoded >= 1e-9 or found.changed > 0
        figures = "".join(f"{figure:>10.1e}" for figure in (found.logits, found.losses, found.decoded))
        print(f"{family:<14}{figures}{found.changed:>17}", flush=True)
    return 1 if wrong else 0


def main() -> int:
    """Print the table; 1 where a text or its end differs."""
    import transformers

    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--train", action="store_true", help="runs that lumina train trained, instead of random weights"
    )
    every = (*FAMILIES, *NEWER, *EXPERTS)
    parser.add_argument("--families", nargs="+", default=every, choices=every)
    parser.add_argument("--checks", action="store_true", help="what tests.infer.hf.family_checks finds, instead")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    chosen = parser.parse_args()
    if chosen.checks:
        return print_checks(chosen.families)
    wrong = 0
    print(f"{'family':<12}{'run':<10}{'equal':>10}{'stopped':>10}{'tokens at most':>16}")
    for family in chosen.families:
        for kind in chosen.kinds:
            with tempfile.TemporaryDirectory() as place:
                run = (train_run if chosen.train else make_run)(Path(place), family, kind)
                folder = export(run, Path(place) / "out").folder
                ours, theirs = lumina_says(load(run, precision="fp32"), PROMPTS), transformers_says(folder, PROMPTS)
            equal = sum(one == other for one, other in zip(ours, theirs, strict=True))
            wrong += len(PROMPTS) - equal
            stopped = sum(answer.stopped for answer in ours)
            print(f"{family:<12}{kind:<10}{equal:>7}/{len(PROMPTS)}{stopped:>10}{LENGTH:>16}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
