"""What `overlong_context` is worth: held-out loss after as many training tokens, by the share that chunks begin with.

    python benchmarks/overlong_context.py [--steps 150] [--seeds 2] [--shares 0 0.125 0.25 0.5]

The data is made with a seed and is like retrieval: a system message, a user's turn that is a long document with the
question at its end, and a long answer, most of them longer than the context. The question names subjects, and the
answer goes through them in that order with the words of each: what comes next in a later chunk can be known from the
question alone. Held out are conversations of the same kind with short documents, which fit the context whole. Every run
takes as many steps of as many packed rows, and has a small vocabulary of these words. The columns: share, seed,
evaluation loss in nats, share of repeated tokens, share of supervised tokens, answers begun without their question and
with the end of it alone.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from lumina import load_config, prepare, train

SUBJECTS, WORDS_EACH, SEQ_LENGTH, VOCABULARY = 40, 12, 256, 1024


def _words() -> list[str]:
    """Made-up words of one syllable, SUBJECTS times WORDS_EACH of them or more, in an order of their own."""
    words = [first + vowel + last for first in "bdfgklmnprstvz" for vowel in "aeiou" for last in "nrlstmdk"]
    random.Random(1).shuffle(words)
    return words


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of these words and ChatML, in a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator([" ".join(_words())] * 2, trainer)
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}))
    return folder


def write(path: Path, count: int, document: tuple[int, int], named: tuple[int, int], seed: int) -> None:
    """Conversations whose documents have so many words, and whose questions name so many subjects."""
    draw = random.Random(seed)
    words = _words()
    own = [words[i * WORDS_EACH : (i + 1) * WORDS_EACH] for i in range(SUBJECTS)]
    lines = []
    for _ in range(count):
        text = " ".join(draw.choices(words, k=draw.randint(*document)))
        subjects = draw.sample(range(SUBJECTS), draw.randint(*named))
        question = "Write of " + ", then of ".join(own[subject][0] for subject in subjects)
        parts = [" ".join(draw.choice(own[s]) for _ in range(draw.randint(20, 40))) + "." for s in subjects]
        turns = [("system", "Answer from the text."), ("user", f"{text}\n{question}"), ("assistant", "\n".join(parts))]
        lines.append(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}))
    path.write_text("\n".join(lines) + "\n")


def measure(folder: Path, share: float, seed: int, steps: int) -> dict[str, Any]:
    """One run's figures."""
    config = load_config(
        "nano",
        train_data=[str(folder / "train.jsonl")],
        eval_data=[str(folder / "held-out.jsonl")],
        tokenizer=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        overlong_context=share,
        seq_length=SEQ_LENGTH,
        hidden_size=128,
        num_layers=3,
        seed=seed,
        epochs=1000,
        max_steps=steps,
        batch_size=4,
        global_batch_size=8,
        learning_rate=3e-3,
        eval_every_n_batches=steps,
        save_every_n_batches=10 * steps,
        output_dir=str(folder),
        experiment_name=f"share-{share}-{seed}",
        cache_dir=str(folder / "cache"),
        live_view=False,
    )
    dataset, held_out = prepare(config)
    assert held_out is not None
    assert not held_out.account["overlong_conversations"], "what is held out fits the context"
    run, account = train(config), dataset.account
    (evaluation,) = run.metrics("eval")
    return {
        "share": share,
        "seed": seed,
        "loss": evaluation["loss"],
        "repeated": account["tokens_repeated"] / dataset.num_tokens,
        "supervised": dataset.num_supervised / dataset.num_tokens,
        "without question": account["answers_without_question"],
        "question cut": account["answers_with_question_cut"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.125, 0.25, 0.5])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_tokenizer(folder / "tokenizer")
        write(folder / "train.jsonl", 600, (60, 400), (4, 8), seed=1)
        write(folder / "held-out.jsonl", 60, (20, 40), (2, 3), seed=2)
        found = [measure(folder, share, seed, given.steps) for seed in range(given.seeds) for share in given.shares]
    print("\n".join(json.dumps(row) for row in found))


if __name__ == "__main__":
    main()
