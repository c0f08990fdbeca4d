"""How well a run of the quickstart answers other forms of the questions that it was taught.

    python benchmarks/paraphrases.py [RUN]        experiments/quickstart when not given

Its settings were chosen by this, not by the three prompts that `make quickstart` asks. Each question of the everyday
exchanges stands beside another form of it that is not in the training text; answers are greedy. An answer is right when
it is one of those that the corpus has to that question, letters and digits alone compared. The last line is the count.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict

from lumina import generate, load_model
from lumina.data.everyday import read_exchanges

FORMS = [
    ("Tell me a joke", "Please tell me a funny joke."),
    ("Tell me a joke", "Do you know a good joke?"),
    ("Tell me a joke", "I would like to hear a joke"),
    ("My computer won't turn on.", "My computer is not turning on."),
    ("My computer won't turn on.", "Why won't my computer start?"),
    ("My printer is not printing.", "My printer does not print anything."),
    ("My internet is not working.", "The internet does not work."),
    ("My mouse is not responding.", "My mouse stopped responding, please help."),
    ("I forgot my password.", "I can't remember my password."),
    ("I can't hear any sound.", "There is no sound."),
    ("My laptop screen is black.", "The screen of my laptop stays black."),
    ("Hi, How is it going?", "Hi there, how is it going with you?"),
    ("How are you?", "How are you these days?"),
    ("Good morning, how are you?", "Good evening, and how are you?"),
    ("Who are you?", "Can you tell me who you are?"),
    ("Where are you from", "Where do you come from?"),
    ("What is your favorite book?", "What book do you like best?"),
    ("What is AI?", "Can you explain what AI is?"),
    ("do you eat", "Do you ever eat something?"),
    ("What are your hobbies?", "Tell me about your hobbies, please."),
    ("What is your favorite number", "Which number is your favorite?"),
    ("Can you die", "Could you die?"),
    ("Nice to meet you.", "So nice to meet you at last!"),
    ("What is your age", "How old are you, what is your age?"),
    ("Can I ask you a question?", "May I ask you something?"),
    ("My system is overheating.", "My computer is overheating!"),
]


def _letters(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def main() -> None:
    answers = defaultdict(set)
    for messages in read_exchanges():
        answers[messages[0]["content"]].add(_letters(messages[1]["content"]))
    model, right = load_model(sys.argv[1] if len(sys.argv) > 1 else "experiments/quickstart"), 0
    for question, form in FORMS:
        answer = generate(model, form, temperature=0, max_length=60).text
        fits = _letters(answer) in answers[question]
        right += fits
        print(f"{'right' if fits else 'wrong'}  {form}  {answer}", flush=True)
    print(f"{right} of {len(FORMS)}")


if __name__ == "__main__":
    main()
