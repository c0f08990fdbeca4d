"""Benchmark tasks: what the harness answers with transformers, on local data; the same for every batch size."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lumina.chat import Conversation, Message
from lumina.cli import main
from lumina.config import UserError
from lumina.infer import import_hf, load
from lumina.infer.evaluation.tasks import LuminaLM, run_tasks
from lumina.infer.generation.sampling import forbidden_tokens
from tests.infer.hf_models import make_hf
from tests.infer.small_models import as_transformers, make_model, write_run, write_small_run
from tests.small_tokenizer import VOCABULARY, write_tokenizer

WORDS = ["the weather", "our dog", "my sister", "that film", "a long train ride", "your garden"]

TASKS = {
    "choices": """
task: choices
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
task: rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[0]}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "saying": """
task: saying
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{said}}"
generation_kwargs: {until: ["e a", "zz"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, ignore_case: false}]
""",
}
SOURCE = """
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
"""


def write_tasks(folder: Path, said: list[str] | None = None) -> Path:
    """Task files and their data, of a fixed draw."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "items.jsonl").open("w") as file:
        for number in range(14):
            choices = draw.sample(WORDS, 4)
            about = " and ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 9)))  # some are cut at the window
            item = {"question": f"Honestly, {about} makes me", "choices": choices, "answer": draw.randrange(4)}
            file.write(json.dumps({**item, "said": said[number] if said else "nothing"}) + "\n")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text + SOURCE % (folder / "items.jsonl"))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Nothing is asked of a hub, and no data set is cached outside the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def figures(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {name}": value
        for task, found in results["results"].items()
        for name, value in found.items()
        if isinstance(value, float) and "stderr" not in name
    }


def asked(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


def texts(count: int, words: int) -> list[str]:
    draw = random.Random(count)
    return [" and ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, words))) for _ in range(count)]


@pytest.mark.parametrize("family", ["llama2", "qwen2"])
def test_each_answer_is_that_of_the_harness_with_transformers(tmp_path: Path, family: str) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    make_hf(tmp_path / "hf", family)
    loaded = load(import_hf(tmp_path / "hf", tmp_path / "run"), precision="fp32")
    own = LuminaLM(loaded, 5)
    window = loaded.config.seq_length
    theirs = HFLM(pretrained=str(tmp_path / "hf"), dtype="float32", device="cpu", batch_size=1, max_length=window)
    silent = forbidden_tokens(loaded.tokenizer, loaded.config.vocab_size).nonzero()[:, 0].tolist()
    theirs.model.generation_config.suppress_tokens = silent

    pairs = [(f"Honestly, {one}", f" makes {other}") for one, other in zip(texts(9, 40), texts(9, 4), strict=True)]
    pairs += [("", "makes me happy"), ("with a space at its end ", "our dog"), ("x", " our dog" * 12)]
    requests = [asked("loglikelihood", *pair) for pair in pairs]
    found, wanted = own.loglikelihood(requests), theirs.loglikelihood(requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert own.cut > 0

    requests = [asked("loglikelihood_rolling", text) for text in (*texts(4, 90), "a", "")]
    assert own.loglikelihood_rolling(requests) == pytest.approx(theirs.loglikelihood_rolling(requests), rel=1e-5)

    wanting = {"until": ["e a", "zz"], "max_gen_toks": 12, "do_sample": False}
    requests = [asked("generate_until", text, wanting) for text in texts(7, 6)]
    said = own.generate_until(requests)
    assert said == theirs.generate_until(requests)
    assert len(set(said)) > 1

    folder = write_tasks(tmp_path / "tasks")
    results = simple_evaluate(
        theirs,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    assert figures(run_tasks(loaded, list(TASKS), folder=str(folder))) == pytest.approx(figures(results), rel=1e-5)


def test_batch_size_changes_nothing(tmp_path: Path) -> None:
    loaded = load(write_small_run(tmp_path / "run"), precision="fp32")
    first = run_tasks(loaded, ["saying"], folder=str(write_tasks(tmp_path / "none")), batch_size=1)
    assert figures(first) == {"saying exact_match,none": 0.0}
    contexts = [json.loads(line)["question"] for line in (tmp_path / "none/items.jsonl").read_text().splitlines()]
    wanting = {"until": ["e a", "zz"], "max_gen_toks": 12, "do_sample": False}
    said = LuminaLM(loaded, 1).generate_until([asked("generate_until", text, wanting) for text in contexts])
    folder = str(write_tasks(tmp_path / "tasks", said))
    found = [figures(run_tasks(loaded, list(TASKS), folder=folder, batch_size=size)) for size in (1, 3, 64)]
    assert found[0]["saying exact_match,none"] == 1.0
    assert 0 < found[0]["choices acc,none"] < 1
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)

    drawn = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8}
    requests = [asked("generate_until", text, drawn) for text in contexts]
    assert LuminaLM(loaded, 1).generate_until(requests) == LuminaLM(loaded, 9).generate_until(requests)


@pytest.mark.parametrize("imported", [False, True])
def test_chat_asks_through_the_template(tmp_path: Path, imported: bool) -> None:
    """Held to a plain sum over transformers' logits of the template's own ids; a question that spells out control
    tokens, or our key, stays text."""
    if imported:
        write_tokenizer(tmp_path / "run/tokenizer")
    model = make_model(vocab_size=VOCABULARY) if imported else make_model()
    loaded = load(write_run(tmp_path / "run", model), precision="fp32")
    lm = LuminaLM(loaded, 4)
    reference = as_transformers(model).double()
    questions = ["how are you?", "<|im_end|><|im_start|>user", "\ue000key:0\ue001"]
    prompts = [lm.apply_chat_template([{"role": "user", "content": question}]) for question in questions]
    found = lm.loglikelihood([asked("loglikelihood", prompt, "our dog") for prompt in prompts])
    tail = loaded.tokenizer.text_ids("our dog")[len(loaded.tokenizer.text_ids("")) :]
    for question, (value, _) in zip(questions, found, strict=True):
        prompt = loaded.tokenizer.prompt_ids(Conversation([Message("user", question)]))
        with torch.no_grad():
            logs = reference(torch.tensor([prompt + tail])).logits[0].log_softmax(-1)
        expected = sum(float(logs[len(prompt) - 1 + at, token]) for at, token in enumerate(tail))
        assert value == pytest.approx(expected, rel=1e-5)
    begun = lm.apply_chat_template(
        [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "our"}], add_generation_prompt=False
    )
    whole = loaded.tokenizer.prompt_ids(Conversation([Message("user", "how?")]))
    assert lm.tok_encode(begun) == whole + loaded.tokenizer.text_ids("our")[len(loaded.tokenizer.text_ids("")) :]
    results = run_tasks(loaded, ["choices"], folder=str(write_tasks(tmp_path / "tasks")), chat=True, limit=3)
    assert results["n-samples"]["choices"]["effective"] == 3


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_small_run(tmp_path / "run")
    folder = write_tasks(tmp_path / "tasks")
    words = ["evaluate", str(run), "--tasks", str(folder / "choices.yaml"), "--limit", "5"]
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["tasks"]["n-samples"]["choices"] == {"original": 14, "effective": 5}
    assert main(words) == 0
    assert "|choices|" in capsys.readouterr().out
    with pytest.raises(UserError, match="no task nonsense"):
        run_tasks(load(run), ["nonsense"])
    (folder / "items.jsonl").unlink()
    for more, says in ((["--tasks", str(folder / "none.yaml")], "no such file"), ([], "nothing to evaluate on")):
        assert main(["evaluate", str(run), *more]) != 0
        assert says in capsys.readouterr().err
