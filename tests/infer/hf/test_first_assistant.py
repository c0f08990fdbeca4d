"""docs/first-assistant.md: its five commands as they stand, on a small random model of that form for the download."""

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lumina import cli
from tests.infer.hf_models import make_hf
from tests.runs.processes import clean_environment

DOCUMENT = Path(__file__).parents[3] / "docs/first-assistant.md"


def commands() -> list[list[str]]:
    block = re.search(r"^```bash\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block is not None
    return [shlex.split(line) for line in block[1].splitlines()]


def write_conversations(path: Path) -> None:
    topics = ["tea", "rain", "trains", "music", "bread", "gardens", "chess", "maps", "salt", "ink"]
    with path.open("w", encoding="utf-8") as file:
        for topic in topics * 2:
            said = [("user", f"what of {topic}?"), ("assistant", f"I like {topic}.")]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}) + "\n")


def test_the_five_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    download, *others = commands()
    assert download[:2] == ["hf", "download"]
    assert [words[:2] for words in others] == [["lumina", name] for name in ("import", "train", "chat", "export")]
    make_hf(Path(download[download.index("--local-dir") + 1]), "smollm2")
    write_conversations(tmp_path / "my.jsonl")
    monkeypatch.setattr("sys.stdin", io.StringIO("what of tea?\n"))
    for words in others:
        if words[1] == "train":  # in a process of its own, as a user's is: it leaves its process group when it ends
            subprocess.run([sys.executable, "-P", "-m", *words], check=True, env=clean_environment())
        else:
            assert cli.main(words[1:]) == 0, words

    model, tokenizer = (kind.from_pretrained("my-assistant") for kind in (AutoModelForCausalLM, AutoTokenizer))
    base = AutoModelForCausalLM.from_pretrained("smollm2", dtype=model.dtype)
    changed = [name for name, weight in model.state_dict().items() if not torch.equal(weight, base.state_dict()[name])]
    assert changed
    assert all("_proj" in name for name in changed)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what of tea?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**asked, max_new_tokens=4, do_sample=False).shape[1] > asked["input_ids"].shape[1]
