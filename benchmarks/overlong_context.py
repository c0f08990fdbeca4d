"""What `overlong_context` is worth: held-out loss after as many training tokens, by the share that chunks begin with.

    python benchmarks/overlong_context.py [--steps 500] [--seeds 2] [--shares 0 0.125 0.25 0.5] [--questions short long]

The data is made with a seed and is like retrieval: a system message, a user's turn that is a long document with the
question at its end, and an answer; most conversations are several times longer than the context, and so are some of
the answers. The question names subjects, and the answer is made of words of these subjects alone: which ones can be
known from the question, or from what the answer has said before. A short question (4 to 8 subjects) fits an eighth of
the context with the system message, a long one (10 to 16) a quarter.

Every run takes as many steps of as many packed rows. Two evaluations, both of whole conversations: those with short
documents and answers, which fit the context of training, and those like the training data, in a context eight times
longer. The columns: the questions, share, seed, both losses in nats, share of repeated tokens, share of supervised
tokens, answers begun without their question and with the end of it alone.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from lumina import evaluate, load_config, prepare, train

SUBJECTS, WORDS_EACH, SEQ_LENGTH, VOCABULARY = 40, 4, 128, 640
WORDS = SUBJECTS * (1 + WORDS_EACH) + 40  # what questions call subjects, the words of each, and those of documents
QUESTIONS = {"short": (4, 8), "long": (10, 16)}  # subjects in a question


def _words() -> list[str]:
    """560 made-up words of one syllable, in an order of their own."""
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
    fast.train_from_iterator([" ".join(_words()[:WORDS]), "system", "user", "assistant", "Read."] * 2, trainer)
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}))
    return folder


def write(path: Path, count: int, subjects: tuple[int, int], document: int, answer: int, seed: int) -> None:
    """Conversations with so many subjects, whose documents and answers have up to so many words."""
    draw = random.Random(seed)
    words = iter(_words())
    names = list(islice(words, SUBJECTS))
    own = [list(islice(words, WORDS_EACH)) for _ in names]
    others = list(islice(words, WORDS - SUBJECTS * (1 + WORDS_EACH)))
    lines = []
    for _ in range(count):
        asked = draw.sample(range(SUBJECTS), draw.randint(*subjects))
        question = " ".join(names[subject] for subject in asked)
        told = " ".join(draw.choice(own[draw.choice(asked)]) for _ in range(draw.randint(answer // 8, answer)))
        text = " ".join(draw.choices(others, k=draw.randint(document // 8, document)))
        turns = [("system", "Read."), ("user", f"{text} {question}"), ("assistant", told)]
        lines.append(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}))
    path.write_text("\n".join(lines) + "\n")


def whole_loss(run: Path, held_out: Path) -> float:
    """The loss of the answers of whole conversations, in a context eight times as long as that of training."""
    config = run / "config.yaml"
    text = config.read_text()
    assert f"seq_length: {SEQ_LENGTH}\n" in text
    config.write_text(text.replace(f"seq_length: {SEQ_LENGTH}\n", f"seq_length: {8 * SEQ_LENGTH}\n"))
    found = evaluate(run, [str(held_out)])
    assert not found["cuts_at_the_window"], "what is held out fits the longer context"
    return float(found["loss"])


def measure(folder: Path, questions: str, share: float, seed: int, steps: int) -> dict[str, Any]:
    """One run's figures."""
    config = load_config(
        "nano",
        train_data=[str(folder / f"{questions}.jsonl")],
        eval_data=[str(folder / f"{questions}-fits.jsonl")],
        tokenizer=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        overlong_context=share,
        seq_length=SEQ_LENGTH,
        hidden_size=128,
        num_layers=2,
        init_std=0.1,  # with the usual 0.02 so narrow a model spends its first hundreds of steps on growing its weights
        precision="fp32",
        seed=seed,
        epochs=1000,
        max_steps=steps,
        batch_size=8,
        global_batch_size=8,
        learning_rate=3e-3,
        eval_every_n_batches=steps,
        save_every_n_batches=10 * steps,
        output_dir=str(folder),
        experiment_name=f"{questions}-{share}-{seed}",
        cache_dir=str(folder / "cache"),
        live_view=False,
    )
    dataset, held_out = prepare(config)
    assert held_out is not None
    assert not held_out.account["overlong_conversations"], "what is held out fits the context"
    run, account = train(config), dataset.account
    evaluation = evaluate(run.folder, [str(folder / f"{questions}-fits.jsonl")])
    return {
        "questions": questions,
        "share": share,
        "seed": seed,
        "loss": round(evaluation["loss"], 4),
        "whole": round(whole_loss(run.folder, folder / f"{questions}-whole.jsonl"), 4),
        "repeated": round(account["tokens_repeated"] / dataset.num_tokens, 3),
        "supervised": round(dataset.num_supervised / dataset.num_tokens, 3),
        "without question": account["answers_without_question"],
        "question cut": account["answers_with_question_cut"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.125, 0.25, 0.5])
    parser.add_argument("--questions", choices=list(QUESTIONS), nargs="+", default=list(QUESTIONS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_tokenizer(folder / "tokenizer")
        found = []
        for questions in given.questions:
            subjects = QUESTIONS[questions]
            write(folder / f"{questions}.jsonl", 3000, subjects, document=400, answer=240, seed=1)
            write(folder / f"{questions}-fits.jsonl", 100, subjects, document=24, answer=40, seed=2)
            write(folder / f"{questions}-whole.jsonl", 100, subjects, document=400, answer=240, seed=3)
            for share in given.shares:
                for seed in range(given.seeds):
                    found.append(measure(folder, questions, share, seed, given.steps))
    print("\n".join(json.dumps(row) for row in found))


if __name__ == "__main__":
    main()
