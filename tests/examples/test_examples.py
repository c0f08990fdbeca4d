"""What stands in examples/ runs: the notebook, the callback, a data format and a model family from outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs.processes import clean_environment
from tests.small_tokenizer import VOCABULARY, write_tokenizer

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def install(example: str, folder: Path) -> dict[str, str]:
    """Build and install an example's package into a folder, as pip does it; an environment that has it."""
    source, site = folder / "source", folder / "site"
    shutil.copytree(EXAMPLES / example, source)  # a build leaves files beside its source
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*command, str(site), str(source)], check=True, timeout=280)
    return {**clean_environment(), "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}


def python(code: str, environment: dict[str, str], *arguments: object) -> str:
    # Not from the working directory: there transformers would take kernels/ for the package of that name (-P).
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_data_format_from_outside(tmp_path: Path) -> None:
    """The records are told by their keys and by name, and a record that does not fit is counted with its reason."""
    environment = install("format", tmp_path)
    data = tmp_path / "dialogues.jsonl"
    records = [{"topic": "greetings", "turns": ["hi", f"hello {i}", "bye", "see you"]} for i in range(9)]
    data.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"turns": "hi"}]))
    source = json.dumps([{"path": str(data), "format": "turns", "weight": 1.0}])
    code = (
        "import json, sys; from lumina import load_config, prepare\n"
        "for settings in ({'train_data': [sys.argv[1]]}, {'data': json.loads(sys.argv[2])}):\n"
        "    train, _ = prepare(load_config('nano', cache_dir=sys.argv[3], num_workers=1, **settings))\n"
        "    print(json.dumps(train.account))\n"
    )
    told, named = map(json.loads, python(code, environment, data, source, tmp_path / "cache").splitlines())
    for account in (told, named):
        assert (account["conversations"], account["messages_trained"], account["messages_masked"]) == (9, 18, 27)
        assert (account["bad_lines"], list(account["faults"])) == (1, ["wrong type"])
        assert account["fields"]["used"] == {"topic": 9, "turns": 9}


FAMILY = """
import sys; from pathlib import Path; import torch
from transformers import AutoModelForCausalLM, SeedOssConfig, SeedOssForCausalLM
from lumina import export, generate, import_model, load_model
work, vocabulary = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
theirs = SeedOssForCausalLM(SeedOssConfig(
    vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, eos_token_id=2, initializer_range=0.3,
)).eval()
for parameter in theirs.parameters():
    if parameter.ndim == 1:
        torch.nn.init.uniform_(parameter, 0.3, 1.7)  # made as ones and zeros, which would hide a mistake
theirs.save_pretrained(work / "hf")
for file in (work / "tokenizer").iterdir():
    (work / "hf" / file.name).write_bytes(file.read_bytes())
run = import_model(work / "hf", work / "run")
ours = load_model(run, "fp32")
assert ours.config.family == "seed_oss" and generate(ours, "hi", max_length=4, temperature=0).ids
back = AutoModelForCausalLM.from_pretrained(export(run, work / "back"))
assert type(back) is SeedOssForCausalLM
for (name, a), (_, b) in zip(theirs.state_dict().items(), back.state_dict().items(), strict=True):
    assert torch.equal(a, b), name
ids = torch.arange(3, 40)[None]
with torch.no_grad():
    print(float((ours.model(ids, torch.arange(37)[None]) - theirs(ids).logits).abs().max()))
"""


@pytest.mark.long
def test_a_model_family_from_outside(tmp_path: Path) -> None:
    """transformers' own class of the family gives the logits, and takes the exported weights back bit for bit."""
    environment = install("family", tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    assert float(python(FAMILY, environment, tmp_path, VOCABULARY).split()[-1]) < 1e-4


@pytest.mark.long
def test_the_callback(tmp_path: Path, chitchat: Path) -> None:
    """As it stands, with the step count and the bound of a test."""
    code = (EXAMPLES / "callback.py").read_text()
    code = code.replace(
        '"max_steps": 200',
        f'"max_steps": 4, "output_dir": {str(tmp_path)!r}, "batch_size": 1, "gradient_accumulation_steps": 1',
    )
    code = code.replace("bits=8.0", "bits=100.0")
    printed = python(code, {**clean_environment(), "OMP_NUM_THREADS": "2"}, chitchat)
    assert "good-enough" in printed
    run = json.loads((tmp_path / "good-enough" / "run.json").read_text())
    assert run["starts"][-1]["end"]["state"] == "stopped", "at the first steps, whose loss is below 100 bits"
    assert "bits per token" in run["starts"][-1]["end"]["reason"]
    assert list((tmp_path / "good-enough" / "checkpoints").glob("step-*")), "saved before it stopped"


@pytest.fixture(scope="module")
def chitchat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chitchat")
    subprocess.run([sys.executable, "-m", "lumina.data.chitchat", str(folder)], check=True, timeout=280)
    return folder / "chitchat.train.jsonl"


@pytest.mark.long
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell in a real kernel; its plot is a picture and its answers are text."""
    import nbformat
    from nbclient import NotebookClient

    for name in os.environ.keys() - clean_environment().keys():
        monkeypatch.delenv(name)  # of a process group that another test made in this process
    for name, value in {"STEPS": "2", "WORK": str(tmp_path), "OMP_NUM_THREADS": "2"}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(EXAMPLES / "train_nano.ipynb", as_version=4)
    NotebookClient(notebook, timeout=250, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("(True," in output.get("data", {}).get("text/plain", "") for output in outputs), "run.finished"
    assert "> Do you have any pets?" in "".join(output.get("text", "") for output in outputs)


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = json.loads((EXAMPLES / "train_nano.ipynb").read_text())
    assert not any(cell.get("outputs") for cell in notebook["cells"])
