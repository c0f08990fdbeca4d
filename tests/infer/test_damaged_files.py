"""Two thousand damaged files: imports, loads and exports end well or in a UserError, and nothing in a file is run.

Memory is limited meanwhile, so that a header's word for a size is not taken, and an alarm ends what would never end.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from lumina.chat import Conversation, Message
from lumina.chat.hf.tokenizer import HFTokenizer
from lumina.config import ModelConfig, UserError
from lumina.infer import export, import_hf, load
from lumina.model import Transformer
from tests.infer.damage import Payload, damaged
from tests.infer.small_models import write_run
from tests.small_tokenizer import VOCABULARY, write_tokenizer

SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "seq_length": 64}
CHAT = Conversation([Message("user", "hello <|im_end|>"), Message("assistant", "you"), Message("user", "today")])


@contextmanager
def bounded() -> Iterator[None]:
    """No more than 2 GB beyond what is mapped now; an alarm after two minutes."""

    def late(*_: object) -> None:
        raise TimeoutError("a damaged file was read for two minutes")

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2 * 2**30, before[1]))
    former = signal.signal(signal.SIGALRM, late)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(
    folder: Path,
    count: int,
    seed: int,
    use: Callable[[Path], None],
    mend: Callable[[Path], None] = lambda victim: None,
    spare: Collection[str] = (),
) -> Counter[str]:
    """Damage one file of `folder` at a time, none called as in `spare`; `mend` what would give it away, `use` the
    folder, put the file back. Returns how often what came of it, by file."""
    draw, found = random.Random(seed), Counter[str]()
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in spare)
    whole = {path: path.read_bytes() for path in files}
    marker = folder.parent / "marker"
    payload = pickle.dumps(Payload(marker))
    with bounded():
        for _ in range(count):
            victim = draw.choice(files)
            victim.write_bytes(damaged(whole[victim], victim.name, draw, payload))
            mend(victim)
            signal.alarm(120)
            try:
                use(folder)
                found[f"{victim.name} taken"] += 1
            except UserError:
                found[f"{victim.name} refused"] += 1
            for path, data in whole.items():
                if path == victim or path.name == "manifest.json":
                    path.write_bytes(data)
    assert not marker.exists()
    assert all(found[f"{path.name} refused"] for path in files), found
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny model."""
    folder = tmp_path_factory.mktemp("run") / "run"
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE, vocab_size=VOCABULARY))  # type: ignore[arg-type]
    write_tokenizer(folder / "tokenizer")
    write_run(folder, model)
    # The model's settings alone, as an import leaves them: YAML is read slowly.
    (folder / "config.yaml").write_text(yaml.safe_dump(model.config.model_dump()))
    return folder


def test_damaged_tokenizers(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    (folder / "stops.json").write_text('{"stop_ids": [2]}')
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"bos_token": {"content": "<|endoftext|>"}, "pad_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(settings))

    def use(folder: Path) -> None:
        tokenizer = HFTokenizer(folder)
        tokenizer.decode(tokenizer.prompt_ids(CHAT))
        tokenizer.check_trainable()

    found = fuzz(folder, 600, 1, use)
    assert found["tokenizer_config.json taken"] > 20


def test_damaged_hugging_face_folders(tmp_path: Path, run: Path) -> None:
    """The weights, their index, and the configuration."""

    def use(folder: Path) -> None:
        try:
            import_hf(folder, tmp_path / "out")
        finally:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "sharded"]

    for name, size, count in (("hf", "5GB", 500), ("sharded", "20KB", 400)):
        (tmp_path / "hf").mkdir(exist_ok=True)
        (tmp_path / "sharded").mkdir(exist_ok=True)
        (tmp_path / name).rmdir()
        folder = export(run, tmp_path / name, shard_size=size).folder
        assert len(list(folder.glob("*.safetensors"))) > (name == "sharded")
        (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
        (folder / "README.md").unlink()
        fuzz(folder, count, 2, use, spare=("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))


def test_damaged_runs(tmp_path: Path, run: Path) -> None:
    """With hashes that fit the damage, so that it is read and not found by its hash; and a manifest that is damaged."""
    copy = shutil.copytree(run, tmp_path / "run")
    victims = [""]

    def mend(victim: Path) -> None:
        victims.append(victim.name)
        manifest = victim.with_name("manifest.json")
        if victim.parent.name != "step-00000005" or victim == manifest:
            return
        values = json.loads(manifest.read_text())
        for entry in values["files"]:
            data = (victim.parent / entry["name"]).read_bytes()
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps(values))

    def use(folder: Path) -> None:
        try:
            if victims[-1] in ("trainer.json", "config.yaml"):
                export(folder, tmp_path / "out", form="safetensors")
            else:
                load(folder, precision="fp32")
        finally:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            assert [path.name for path in tmp_path.iterdir()] == ["run"]

    fuzz(copy, 500, 3, use, mend, spare=[path.name for path in (copy / "tokenizer").iterdir()])


@pytest.mark.parametrize("line", ["num_layers: 99999999", "vocab_size: 999999999", "hidden_size: 1000000000000"])
def test_a_configuration_that_asks_for_the_world(tmp_path: Path, run: Path, line: str) -> None:
    """Refused before anything of that size is made."""
    copy = shutil.copytree(run, tmp_path / "run")
    values = yaml.safe_load((copy / "config.yaml").read_text()) | yaml.safe_load(line)
    (copy / "config.yaml").write_text(yaml.safe_dump(values))
    with bounded():
        signal.alarm(120)
        for use in (load, lambda folder: export(folder, tmp_path / "out")):
            with pytest.raises(UserError, match=r"describes a model of|leave out its tokenizer"):
                use(copy)
