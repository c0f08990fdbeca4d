"""Checks before torch is loaded: wrong paths and settings are refused at once, and every command says what it does."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lumina.terminal import say

if TYPE_CHECKING:
    from lumina.config import Config

log = logging.getLogger("lumina")

LARGE_FOR_A_CPU = 250_000_000  # parameters: `medium`, but not `small`
_GPU_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")  # under /dev: NVIDIA's driver, AMD's, WSL's


def trained_model(given: str) -> Path:
    """The model that a user names, looked for before torch is loaded, and said. Raises UserError."""
    from lumina.checkpoint import model_choices, run_path

    first, path = model_choices(given)[0], run_path(given)
    log.info("loading %s", first)
    stands_for_a_run = not path.exists() and path.name != "best"  # the early README's best_model.pt
    return first.parent.parent if stands_for_a_run else path


def first_rank() -> bool:
    """Whether this process is the only one, or the first of several: the one that speaks."""
    from lumina.cluster import launched

    return launched().rank == 0


def alone() -> bool:
    """Whether no launcher started several ranks."""
    from lumina.cluster import launched

    return launched().world == 1


def before_training(config: Config, yes: bool) -> None:
    """Refuse what can be seen to be wrong without torch, ask about a model that is too large for this machine, and say
    that the run starts. One rank of several checks with the others, where no rank waits for one that has ended.

    Raises:
        UserError: a file that is not there, a run that exists, an output folder that cannot be one, a launcher's
            variables that contradict each other, …
    """
    _refuse_idle_settings(config)
    _refuse_missing_start(config)
    if alone():
        _refuse_wrong_paths(config)
        _ask_about_size(config, yes)
    if first_rank():
        log.info("starting %s: loading PyTorch and DeepSpeed", Path(config.output_dir) / config.experiment_name)


def _refuse_missing_start(config: Config) -> None:
    """UserError for a run that needs another one's weights to begin with and is given none."""
    from lumina.config import UserError

    if config.resume is not None or config.init_from is not None or "LUMINA_JOB" in os.environ:
        return
    why = "Add --init-from RUN (lumina import makes one of a Hugging Face folder)"
    if config.lora_rank:
        raise UserError(
            f"lora_rank {config.lora_rank} trains adapters over the weights of another run, and none is given",
            f"{why}, or set lora_rank to 0.",
        )
    if config.objective == "dpo":
        raise UserError("objective dpo moves a model away from what it began as, and none is given", f"{why}.")


def _refuse_idle_settings(config: Config) -> None:
    """Warn of settings that do nothing; UserError for a name that no list of runs would show."""
    from lumina.config import UserError

    if first_rank():
        for name, why in _idle_settings(config):
            log.warning("%s %s does nothing: %s", name, getattr(config, name), why)
    if Path(config.experiment_name).name != config.experiment_name or config.experiment_name == "..":
        raise UserError(
            f"--experiment-name {config.experiment_name} is no name of one folder, and `lumina runs` would not list it",
            "Give the folders above it with --output-dir.",
        )


def _idle_settings(config: Config) -> list[tuple[str, str]]:
    """The settings that are not at their default and do nothing beside the others, each with the reason."""
    settings = {
        "nothing is evaluated, because neither --eval-data nor --eval-fraction is given": (
            not config.eval_data and not config.eval_fraction,
            ("early_stopping_patience", "eval_every_n_batches", "sample_prompts"),
        ),
        "lora_rank is 0: every weight is trained": (
            not config.lora_rank,
            ("lora_alpha", "lora_dropout", "lora_targets"),
        ),
        "the objective is sft": (config.objective == "sft", ("dpo_beta",)),
        "the model has no experts": (config.experts is None, ("router_aux_loss_coef", "router_z_loss_coef")),
    }
    return [
        (name, why)
        for why, (holds, names) in settings.items()
        for name in names
        if holds and getattr(config, name) != type(config).model_fields[name].get_default(call_default_factory=True)
    ]


def _refuse_wrong_paths(config: Config) -> None:
    from lumina import checkpoint
    from lumina.cluster import own_launch
    from lumina.config import UserError
    from lumina.config import deepspeed as ds_json
    from lumina.data import check_inputs
    from lumina.plan import refuse_missing_compiler

    check_inputs([*config.train_data, *(source.path for source in config.data)])
    if config.eval_data:
        check_inputs(config.eval_data)
    if config.ds_config is not None:
        # As on a GPU, which has every precision: what is refused here is refused anywhere.
        ds_json.resolve(config, 1, "cuda", bf16_supported=True)
    refuse_missing_compiler(config.compile, ds_json.read_json(config.ds_config) if config.ds_config else {}, has_gpu())
    folder = Path(config.output_dir) / config.experiment_name
    writable_folder(folder)
    saved = checkpoint.list_checkpoints(folder / "checkpoints")
    if saved and config.resume is None and own_launch() is None:  # else it may be a restart: looked into later
        raise UserError(
            f"{folder} already holds checkpoints (newest {saved[0].name})",
            "Add --resume auto to go on, or choose another --experiment-name.",
        )
    for given in (config.resume, config.init_from):
        if given not in (None, "auto"):
            checkpoint.candidates(given)
    if config.tokenizer is not None and not Path(config.tokenizer).is_dir():
        raise UserError(f"tokenizer {config.tokenizer} is no folder", "Give an imported model's tokenizer folder.")


def writable_folder(folder: Path) -> None:
    """UserError where `folder` is not there and could not be made, or is no folder that this user may write to."""
    from lumina.config import UserError

    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there} is a file: a run's folder cannot be {folder}", "Choose another --output-dir.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there} may not be written to by this user", "Choose another --output-dir.")


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether a driver shows a GPU here, as device files; asked before torch is loaded."""
    return any(next(devices.glob(pattern), None) is not None for pattern in _GPU_DEVICES)


def _ask_about_size(config: Config, yes: bool) -> None:
    """A large model on a CPU: an estimate, and a question on a terminal. Elsewhere (a launcher, a script) nobody could
    answer: it is said and the run goes on."""
    from lumina.config import UserError, usable_cpus
    from lumina.config.precision import cpu_has_bf16

    parameters = config.num_parameters()
    if parameters < LARGE_FOR_A_CPU or has_gpu():
        return
    cores = len(usable_cpus())
    samples = config.global_batch_size or config.batch_size * config.gradient_accumulation_steps
    tokens = samples * config.seq_length
    # 6 FLOPs a parameter and token, at the rate that benchmarks/train_step.py reached with the debug shape: 721
    # tokens/s on two cores with bf16 instructions, 170 on two without.
    rate = 160e9 if cpu_has_bf16() else 38e9
    seconds = 6 * parameters * tokens / (rate * cores)
    size = (
        f"{parameters / 1e6:.0f} M parameters on {cores} CPU core(s), and no GPU is here: about {_duration(seconds)} "
        f"for each step of {tokens:,} tokens"
    )
    if yes or not (sys.stdin.isatty() and sys.stderr.isatty()):
        log.warning("%s; --config nano (29 M) is made for a CPU", size)
        return
    say(
        f"{size}.\n--config nano (29 M) is made for a CPU. Train this one all the same? [y/N] ", end="", file=sys.stderr
    )
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("not started", "Take --config nano, or add --yes to train this one without the question.")


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, seconds):.0f} seconds"
