"""The command line: what it accepts, where it sends it, how it fails, and that help loads no torch."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lumina import cli
from lumina.config import Config, UserError, load

ROOT = Path(__file__).parents[1]


def test_help_loads_no_torch() -> None:
    program = (
        "import sys, lumina.cli\n"
        "try: lumina.cli.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'deepspeed', 'numpy', 'pydantic', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    for name, command in cli.COMMANDS.items():
        assert name in done.stdout
        assert command.run.__doc__


@pytest.mark.parametrize(
    "argv", [["config", "show", "medium", "--json"], ["estimate-time", "--config", "medium", "--gpu", "h100", "--json"]]
)
def test_reading_and_planning_load_no_torch(argv: list[str]) -> None:
    program = (
        f"import sys, lumina.cli; code = lumina.cli.main({argv!r}); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)


def test_module_and_script_are_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lumina", "--version"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.startswith("lumina 0.")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Catches the configuration that `lumina train` hands to the train room."""
    caught: list[Config] = []
    room = ModuleType("lumina.train")
    room.train_rank = lambda config: caught.append(config) or 0  # type: ignore[attr-defined]
    room.end_process = lambda code: code  # type: ignore[attr-defined]
    room.LostRankError = RuntimeError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lumina.train", room)
    # The files that these command lines name are not there (tests/commands/test_checks.py has the checks).
    monkeypatch.setattr("lumina.commands.train.before_training", lambda config, yes: None)
    return caught


def test_train_defaults_are_the_seeds(trained: list[Config]) -> None:
    assert cli.main(["train", "--train-data", "a.jsonl"]) == 0
    (config,) = trained
    assert config.hidden_size == load("medium").hidden_size
    expected = {
        "train_data": ["a.jsonl"],
        "eval_data": [],
        "epochs": 10,
        "learning_rate": 1e-4,
        "batch_size": 2,
        "gradient_accumulation_steps": 4,
        "precision": "auto",
        "experiment_name": "experiment",
        "output_dir": "experiments",
        "resume": None,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.explicit == {"train_data"}


@pytest.mark.parametrize("rank", ["--local_rank=0", "--local-rank=1"])
def test_a_launcher_may_put_the_local_rank_first(rank: str, trained: list[Config]) -> None:
    """`deepspeed --module lumina train …`, and torch.distributed.launch: before the command."""
    assert cli.main([rank, "train", "--train-data", "a"]) == 0
    assert trained[0].train_data == ["a"]
    with pytest.raises(SystemExit):
        cli.main(["--local_rank=x", "train"])


def test_a_preset_may_be_called_one(trained: list[Config]) -> None:
    assert cli.main(["train", "--preset", "1b", "--train-data", "a"]) == 0
    assert (trained[0].model_name, trained[0].head_dim) == ("1b", 128)


def test_every_train_flag_reaches_its_setting(trained: list[Config]) -> None:
    line = (
        "train --config nano --train-data a b --eval-data c --eval-data d --epochs 3 --lr 2e-4 --lr-scheduler linear "
        "--batch-size 4 --grad-accum 5 --global-batch-size 40 --precision fp32 --experiment-name e --output-dir o "
        "--resume auto --init-from i --ds_config z.json --compile --max-steps 7 --seed 8 --keep-last 9 --no-packing "
        "--eval-every 11 --save-every 12 "
        "--overlong drop --cache-dir k --num-workers 2 --gradient-checkpointing 2 --local_rank 0 --set rope_theta=5e5"
    )
    assert cli.main(line.split()) == 0
    (config,) = trained
    expected = {
        "hidden_size": 256,
        "train_data": ["a", "b"],
        "eval_data": ["c", "d"],
        "epochs": 3,
        "learning_rate": 2e-4,
        "lr_scheduler": "linear",
        "batch_size": 4,
        "gradient_accumulation_steps": 5,
        "global_batch_size": 40,
        "precision": "fp32",
        "experiment_name": "e",
        "output_dir": "o",
        "resume": "auto",
        "init_from": "i",
        "ds_config": "z.json",
        "eval_every_n_batches": 11,
        "save_every_n_batches": 12,
        "compile": True,
        "max_steps": 7,
        "seed": 8,
        "keep_last": 9,
        "packing": False,
        "overlong": "drop",
        "cache_dir": "k",
        "num_workers": 2,
        "gradient_checkpointing": 2,
        "rope_theta": 5e5,
    }
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("spelling", ["--ds_config", "--ds-config"])
def test_both_spellings(trained: list[Config], spelling: str) -> None:
    cli.main(["train", "--train-data", "a", spelling, "z.json", "--gradient-checkpointing", "--resume"])
    assert trained[0].ds_config == "z.json"
    assert trained[0].gradient_checkpointing is True
    assert trained[0].resume == "auto"


@pytest.mark.parametrize("resume", ["auto", "{run}", "{run}/checkpoints/step-000010"])
def test_a_resumed_run_keeps_its_own_configuration(trained: list[Config], tmp_path: Path, resume: str) -> None:
    run = tmp_path / "experiments" / "e"
    (run / "checkpoints" / "step-000010").mkdir(parents=True)
    (run / "config.yaml").write_text(load("nano", {"train_data": ["a"]}).to_yaml(), encoding="utf-8")
    where = ["--output-dir", str(run.parent), "--experiment-name", "e"]
    assert cli.main(["train", "--resume", resume.format(run=run), *where, "--max-steps", "3"]) == 0
    assert (trained[0].hidden_size, trained[0].train_data, trained[0].max_steps) == (256, ["a"], 3)
    # --config says otherwise
    cli.main(["train", "--resume", resume.format(run=run), *where, "--config", "debug", "--train-data", "b"])
    assert (trained[1].hidden_size, trained[1].train_data) == (512, ["b"])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["trian"], "no such command: trian. Did you mean train?"),
        (["train", "--batchsize", "3"], "unknown option: --batchsize. Did you mean --batch-size?"),
        (["train", "--learning-rat=3"], "unknown option: --learning-rat"),
        (["config", "show", "nano", "extra"], "unknown argument: extra"),
        (["train", "--epochs", "x"], "argument --epochs: invalid int value: 'x'"),
        (["generate", "--resume", "r", "--prompt", "p", "--temperature", "3"], "3 is outside 0 to 2"),
        (["generate", "--resume", "r", "--prompt", "p", "--max-length", "0"], "0 is outside 1 to 2048"),
        (["train", "--max", "3"], "unknown option: --max"),
    ],
)
def test_bad_command_lines(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert says in shown.err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train"], "no training data"),
        (["train", "--config", "nan", "--train-data", "a"], "Did you mean `nano`?"),
        (["train", "--train-data", "a", "--set", "epoch=1"], "Did you mean `epochs`?"),
        (["config", "show", "absent.yaml"], "no such configuration file: absent.yaml"),
    ],
)
def test_users_mistakes_exit_2_without_a_traceback(
    argv: list[str], says: str, trained: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert says in shown.err
    assert trained == []


def raising(error: BaseException) -> cli.Command:
    def run(arguments: Any) -> int:
        """Raise."""
        raise error

    return cli.Command(run, lambda parser: None)


def test_exit_codes_and_crashes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.COMMANDS, "train", raising(KeyboardInterrupt()))
    assert cli.main(["train"]) == 130
    monkeypatch.setitem(cli.COMMANDS, "train", raising(UserError("wrong", "do this")))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err.endswith("error: wrong\n  do this\n")
    # A defect of ours keeps its traceback.
    monkeypatch.setitem(cli.COMMANDS, "train", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_config_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", "debug", "--json", "--set", "epochs=3"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["parameters"] == {"without_embeddings": 22_553_088, "with_embeddings": 73_933_312}
    assert answer["config"]["epochs"] == 3
    assert cli.main(["config", "show", "debug"]) == 0
    shown = capsys.readouterr().out
    assert "22,553,088 without embeddings, 73,933,312 with" in shown
    assert "hidden_size: 512\n" in shown


def original(argv: list[str]) -> list[str]:
    spec = importlib.util.spec_from_file_location("seed_main", ROOT / "main.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    translated: list[str] = module.translate(argv)
    return translated


@pytest.mark.parametrize(
    ("line", "translated"),
    [
        (
            "--config medium --train-data data/train.jsonl --eval-data data/eval.jsonl --epochs 10 --lr 1e-4 "
            "--batch-size 4 --experiment-name my_experiment",
            "train --config medium --train-data data/train.jsonl --eval-data data/eval.jsonl --epochs 10 --lr 1e-4 "
            "--batch-size 4 --experiment-name my_experiment",
        ),
        (
            "--process-oasst input.jsonl output.jsonl --max-conversations 10000",
            "process-oasst input.jsonl output.jsonl --max-conversations 10000",
        ),
        ("--validate-data data/train.jsonl", "validate-data data/train.jsonl"),
        ("--validate-data data/train.jsonl --create-report", "validate-data data/train.jsonl --create-report"),
        ("--create-report --validate-data data/train.jsonl", "validate-data data/train.jsonl --create-report"),
        ("--check-environment", "check-environment"),
        ("--estimate-time --config medium", "estimate-time --config medium"),
        ("--config medium --estimate-time", "estimate-time --config medium"),
        ("--batch-size 1 --grad-accum 8", "train --batch-size 1 --grad-accum 8"),
        ("--precision fp16 --compile", "train --precision fp16 --compile"),
    ],
)
def test_the_original_command_lines(
    line: str, translated: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert original(line.split()) == translated.split()
    cli.parse(translated.split())  # exits on anything unknown


def test_the_original_generation_line() -> None:
    translated = original(["--test-generation", "--resume", "checkpoints/best_model.pt"])
    assert translated == ["generate", "--resume", "checkpoints/best_model.pt", "--prompt", "Hello, how are you?"]
    assert cli.parse(translated).resume == "checkpoints/best_model.pt"
    assert original(["--test-generation", "--resume", "r", "--prompt", "Hi"])[-1] == "Hi"


def test_the_original_tuning_lines_use_the_usual_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").touch()
    assert original(["--batch-size", "1"])[-2:] == ["--train-data", "data/train.jsonl"]
    assert "data/train.jsonl" not in original(["--batch-size", "1", "--train-data=x.jsonl"])


def test_two_original_actions_at_once_are_refused() -> None:
    with pytest.raises(SystemExit, match="cannot be used together"):
        original(["--check-environment", "--estimate-time"])


def test_lumina_alone_prints_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert [name for name in cli.COMMANDS if f"  {name}" not in said] == []
