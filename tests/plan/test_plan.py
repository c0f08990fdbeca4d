"""The search, its advice, and the files it writes."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lumina import cli
from lumina.config import load
from lumina.config.deepspeed import resolve
from lumina.plan.costs.devices import Cluster, find_device
from lumina.plan.costs.setup import Data, read_setup
from lumina.plan.estimate import assumed_data, estimate_run, estimate_setup
from lumina.plan.plan_report import ds_document, write
from lumina.plan.search import NOISE, TILES, buffers_for, candidates, choose, search
from tests.runs import TINY, Runs, steps
from tests.small_tokenizer import small_vocabulary, write_tokenizer

ROOT = Path(__file__).parents[2]
DATA = Data(1e9, None, 1.0, 1.0, "given")


@pytest.mark.parametrize(
    ("preset", "gpu", "nodes", "each", "batch"), [("large", "a100-40gb", 2, 8, 128), ("small", "h100", 1, 1, 7)]
)
def test_the_choice_fits_and_nothing_that_fits_is_faster(
    preset: str, gpu: str, nodes: int, each: int, batch: int
) -> None:
    cluster = Cluster(find_device(gpu), nodes, each)
    found = candidates(load(preset), cluster, DATA, batch, "bf16")
    best = choose(found, cluster)
    assert best is not None
    assert best.memory.device <= cluster.device.memory
    assert all(other.rate * (1 - NOISE) <= best.rate for other in found if other.fits)
    for candidate in found:  # every candidate holds the batch, and not a micro-batch more than it must
        setup = candidate.setup
        assert setup.micro_batch * setup.accumulation * setup.world >= batch
        assert setup.micro_batch * (setup.accumulation - 1) * setup.world < batch


def test_less_memory_means_more_sharing() -> None:
    config = load("large")
    chosen = {}
    for gpu in ("a100-40gb", "b200"):
        cluster = Cluster(find_device(gpu), 1, 8)
        best = choose(candidates(config, cluster, DATA, 64, "bf16"), cluster)
        assert best is not None
        chosen[gpu] = (best.setup.stage, best.setup.checkpoint_every > 0)
    assert chosen["b200"] < chosen["a100-40gb"]


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = cli.main(["plan", *argv])
    return code, capsys.readouterr().out


def test_the_files_are_ready(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the large preset on two nodes of eight A100 40 GB: DeepSpeed takes the JSON at that world size, the
    configuration asks for what was planned, the scripts are valid shell."""
    from deepspeed.runtime import config as deepspeed_config

    capsys.readouterr()  # what DeepSpeed prints when it is imported
    folder = tmp_path / "plan"
    argv = [
        "--config",
        "large",
        "--gpu",
        "a100-40gb",
        "--nodes",
        "2",
        "--gpus-per-node",
        "8",
        "--global-batch-size",
        "100",
    ]
    code, raw = planned(capsys, *argv, "--write", str(folder), "--json")
    assert code == 0
    best: dict[str, Any] = json.loads(raw)["best"]
    config = load(str(folder / "config.yaml"), {"ds_config": str(folder / "ds_config.json")})
    resolved = resolve(config, 16, "cuda", bf16_supported=True)
    setup, _ = read_setup(resolved.config, resolved.json, 16, assumed_data(config, None, None, 1.0))
    wanted = best["shape"]
    for name in ("micro_batch", "accumulation", "stage", "precision", "checkpoint_every", "offload_optimizer"):
        assert getattr(setup, name) == wanted[name], name
    assert resolved.config.global_batch_size == 100
    monkeypatch.setattr(deepspeed_config.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(deepspeed_config.dist, "get_world_size", lambda: 16)
    assert deepspeed_config.DeepSpeedConfig(resolved.json).zero_config.stage == wanted["stage"]
    assert (folder / "hostfile").read_text(encoding="utf-8") == "node1 slots=8\nnode2 slots=8\n"
    bash = shutil.which("bash")
    assert bash is not None
    subprocess.run([bash, "-n", str(folder / "train.sbatch")], check=True)
    script = (folder / "train.sbatch").read_text(encoding="utf-8")
    ours = (ROOT / "launchers" / "train.sbatch").read_text(encoding="utf-8")
    asked = lambda text: {line.split("=")[0] for line in text.splitlines() if line.startswith("#SBATCH")}
    assert "--nodes=2" in script
    assert asked(ours) <= asked(script)  # requeue, the warning signal and the rest
    assert "exec bash launchers/train.sbatch " in script
    # What it starts is what `lumina launch` understands: the commands for every node are printed.
    words = ["train", "--config", str(folder / "config.yaml"), "--ds_config", str(folder / "ds_config.json")]
    words += ["--train-data", "data.jsonl"]
    code = cli.main(["launch", "--hostfile", str(folder / "hostfile"), "--dry-run", "--", *words])
    said = capsys.readouterr().out
    assert code == 0
    assert all(f"node{number}" in said for number in (1, 2))
    assert str(folder / "ds_config.json") in said


def test_hpz_where_the_network_is_slow_beside_the_links_inside() -> None:
    """Sixteen nodes whose network is a hundredth of what it was: what fits with hpZ then beats plain ZeRO 3."""
    config, device = load("large"), find_device("a100-80gb")
    assert device.network is not None
    cluster = Cluster(replace(device, network=device.network / 100), 16, 8)
    found = candidates(config, cluster, DATA, 128, "bf16", (3,))
    best = {hpz: max(c.rate for c in found if c.setup.hpz == hpz) for hpz in (0, 8)}
    assert best[8] > 1.2 * best[0]
    document = ds_document(next(c for c in found if c.setup.hpz == 8))
    assert document["zero_optimization"]["zero_hpz_partition_size"] == 8


def test_gathers_of_8_bits_only_when_asked_for() -> None:
    config = load("8b")
    cluster = Cluster(find_device("h100"), 2, 8)
    usual = candidates(config, cluster, DATA, 128, "bf16", (3,))
    assert not any(c.setup.quantized_weights for c in usual)
    assert "zero_quantized_weights" not in ds_document(usual[0])["zero_optimization"]
    asked = candidates(config, cluster, DATA, 128, "bf16", (3,), True)
    small = next(c for c in asked if c.setup.quantized_weights and not c.setup.hpz)
    whole = next(c for c in asked if c.setup == replace(small.setup, quantized_weights=False))
    assert small.speed.traffic.weights == pytest.approx(whole.speed.traffic.weights / 2, rel=0.01)
    document = ds_document(small)
    assert document["zero_optimization"]["zero_quantized_weights"] is True
    resolved = resolve(config, 16, "cuda", bf16_supported=True, document=document)
    assert read_setup(resolved.config, resolved.json, 16, DATA)[0].quantized_weights


def test_rows_are_shared_by_as_few_ranks_as_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Where none fits in which every rank has rows of its own, or it is slower; the written files ask for it."""
    argv = ["--config", "8b", "--gpu", "h100", "--gpus-per-node", "8", "--global-batch-size", "8"]
    long = [*argv, "--set", "seq_length=500000"]
    code, raw = planned(capsys, *long, "--write", str(tmp_path), "--json")
    size = json.loads(raw)["best"]["shape"]["sequence_parallel"]
    assert code == 0
    assert size > 1
    neither = ["--set", "activation_offloading=false", "--set", "mlp_tile_tokens=null"]
    assert planned(capsys, *long, *neither, "--sequence-parallel", str(size // 2))[0] == 1
    config = load(str(tmp_path / "config.yaml"))
    assert (config.sequence_parallel_size, config.global_batch_size) == (size, 8)
    text = planned(capsys, *long)[1]
    assert f"rows shared by {size} ranks: chosen (" in text
    assert f"rows shared by {size // 2} ranks: does not fit" in text
    assert "rows shared" not in planned(capsys, *argv)[1]


def test_ranks_that_would_only_pad_share_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """One sample for eight ranks: seven would take their time and make no progress."""
    argv = ["--config", "8b", "--gpu", "h100", "--gpus-per-node", "8", "--global-batch-size", "1", "--set"]
    best = json.loads(planned(capsys, *argv, "batch_size=1", "--json")[1])["best"]
    assert best["shape"]["sequence_parallel"] == 8
    config = load("8b", {"batch_size": 1, "global_batch_size": 1})
    alone = estimate_run(config, Cluster(find_device("h100"), 1, 8), DATA)
    useful = config.seq_length / alone.speed.step
    assert alone.speed.tokens_per_second == pytest.approx(useful)
    assert best["tokens_per_second"] > 2 * useful


LONG = ["--config", "8b", "--gpu", "h100", "--set", "seq_length=400000"]


def test_tiles_and_activations_on_the_host_where_nothing_else_fits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A row of 400,000 tokens on one card. What is written asks for all that was planned, and what was asked for by
    hand is not chosen anew."""
    code, text = planned(capsys, *LONG, "--write", str(tmp_path))
    assert code == 0
    assert "rows not shared: does not fit, " in text
    assert "rows not shared, activations on the host: does not fit, " in text
    assert "rows not shared, tiles: does not fit, " in text
    assert "rows not shared, tiles, activations on the host: chosen (micro-batch 1 x " in text
    assert f"every layer recomputed, tiles of {TILES[0]:,} tokens, activations on the host; 1 per" in text
    assert re.search(r"each node needs \d\d\d GB of memory for what is on the host", text)

    shape = json.loads(planned(capsys, *LONG, "--json")[1])["best"]["shape"]
    config = load(str(tmp_path / "config.yaml"), {"ds_config": str(tmp_path / "ds_config.json")})
    resolved = resolve(config, 1, "cuda", bf16_supported=True)
    setup, _ = read_setup(resolved.config, resolved.json, 1, assumed_data(config, None, None, 1.0))
    for name in ("micro_batch", "stage", "offload_optimizer", "checkpoint_every", "mlp_tile", "activation_offloading"):
        assert getattr(setup, name) == shape[name], name
    assert (shape["mlp_tile"], shape["activation_offloading"], shape["checkpoint_every"]) == (TILES[0], True, 1)

    assert planned(capsys, *LONG, "--mlp-tile-tokens", "4096", "--json")[0] == 0
    for name, value in (("activation_offloading", "false"), ("mlp_tile_tokens", "null")):
        assert planned(capsys, *LONG, "--set", f"{name}={value}")[0] == 1, name


def test_heads_are_taken_in_groups_where_nothing_else_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A row of 900,000 tokens on one card."""
    longer = [*LONG[:-1], "seq_length=900000"]
    code, text = planned(capsys, *longer, "--write", str(tmp_path))
    assert code == 0
    assert "rows not shared, tiles, activations on the host: does not fit, " in text
    assert "rows not shared, tiles, groups of heads, activations on the host: chosen (" in text
    assert ", heads in 8 groups, activations on the host; 1 per" in text
    assert load(str(tmp_path / "config.yaml")).attention_head_groups == 8
    assert planned(capsys, *longer, "--attention-head-groups", "1")[0] == 1
    eight = [*LONG[:-1], "seq_length=3000000", "--gpus-per-node", "8", "--attention-head-groups", "8"]
    assert "rows shared by 4 ranks" in planned(capsys, *eight)[1], "8 ranks cannot share groups of 4 query heads"


def test_fewer_ranks_share_a_row_where_that_is_faster() -> None:
    """Eight cards of one node exchange over its links: four that share a row are as fast as two whose activations are
    brought down, and the plain way is taken. Eight nodes of a card exchange over the network."""
    config, device = load("8b", {"seq_length": 400_000}), find_device("h100")
    for nodes, each in ((1, 8), (8, 1)):
        cluster = Cluster(device, nodes, each)
        found = search(config, cluster, DATA, 8, "bf16", (3,))
        assert len({candidate.setup for candidate in found}) == len(found)
        best = choose(found, cluster)
        assert best is not None
        plain = max(c.rate for c in found if c.fits and c.way == (4, False, False, False))
        fewer = max(c.rate for c in found if c.fits and c.way[0] < 4)
        assert max(c.way[0] for c in found) == 4, "more ranks than one must share only exchange more"
        if nodes == 1:
            assert best.way == (4, False, False, False)
            assert fewer * (1 - NOISE) < plain
        else:
            assert best.way[0] < 4
            assert any(best.way[1:])
            assert plain < (1 - NOISE) * fewer
        assert best.rate >= (1 - NOISE) * max(plain, fewer)


def test_what_a_model_cannot_do_is_not_tried() -> None:
    config = load("nano", {"seq_length": 1 << 20, "compile": True})
    cluster = Cluster(replace(find_device("h100"), memory=4e9), 1, 4)
    found = search(config, cluster, DATA, 4, "bf16")
    assert {c.way for c in found} == {(1, False, False, False), (1, False, False, True)}


@pytest.mark.long  # a whole run of two processes
def test_what_is_written_trains(runs: Runs, conversations: Path, tmp_path: Path) -> None:
    """For two imagined cards on which a row of 8,192 tokens fits by tiles or activations on the host alone."""
    settings = {
        **TINY,
        **small_vocabulary(write_tokenizer(tmp_path / "tokenizer")),
        "tokenizer": str(tmp_path / "tokenizer"),
        "train_data": [str(conversations)],
        "output_dir": str(tmp_path),
        "experiment_name": "run",
        "seq_length": 8192,
        "hidden_size": 64,
        "max_steps": 2,
        "num_workers": 1,
    }
    config, device = load("nano", settings), find_device("h100")
    tried = search(config, Cluster(replace(device, memory=1e9), 1, 2), DATA, 2, "bf16")
    plain = min(c.memory.device for c in tried if not any(c.way[1:]))
    cluster = Cluster(replace(device, memory=plain - 1), 1, 2)
    best = choose(search(config, cluster, DATA, 2, "bf16"), cluster)
    assert best is not None
    assert any(best.way[1:])
    write(tmp_path / "plan", config, cluster, best, 2)
    job = runs.train(
        ["--config", str(tmp_path / "plan/config.yaml"), "--ds_config", str(tmp_path / "plan/ds_config.json")],
        2,
    )
    assert len(steps(tmp_path / "run")) == 2
    trained = load(str(tmp_path / "run/config.yaml"))
    assert (trained.sequence_parallel_size, trained.mlp_tile_tokens or 0) == (best.way[0], best.setup.mlp_tile)
    assert trained.attention_head_groups == best.setup.head_groups
    assert trained.activation_offloading == best.way[3]
    assert f"ZeRO-{best.setup.stage}, 2 process(es)" in job.stdout()


def test_a_plan_that_recomputes_nothing_moves_no_inputs_either(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = ["--set", "gradient_checkpointing=true", "--set", "activation_offloading=true"]
    code, raw = planned(capsys, "--config", "small", "--gpu", "h100", *settings, "--write", str(tmp_path), "--json")
    assert (code, json.loads(raw)["best"]["shape"]["checkpoint_every"]) == (0, 0)
    config = load(str(tmp_path / "config.yaml"))
    assert (config.gradient_checkpointing, config.activation_offloading) == (False, False)


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--config", "large", "--gpu", "a100-40gb", "--set", "hidden_size=32768", "--set", "num_layers=120"]
    code, text = planned(capsys, *argv)
    assert code == 1
    assert "nothing fits on 1 a100-40gb" in text
    assert "ZeRO 0: does not fit, " in text


def test_remarks_on_the_wrong_size(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--config", "small", "--gpu", "h100", "--epochs", "1"]
    assert "the model is large for this data" in planned(capsys, *common, "--tokens", "1e7")[1]
    assert "a larger model would learn more" in planned(capsys, *common, "--tokens", "1e12")[1]
    fitting = planned(capsys, *common, "--tokens", "3e9")[1]
    assert "per parameter" not in fitting.split("data:")[1].split("\n", 1)[1]
    few = planned(capsys, *common, "--gpus-per-node", "8", "--global-batch-size", "3")[1]
    assert "8 ranks for 3 samples a step: 5 only pad" in few


def test_a_plan_needs_a_gpu_and_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, "--config", "small")[0] == 2
    assert planned(capsys, "--config", "small", "--gpu", "h100", "--ds_config", "x.json")[0] == 2


def test_a_candidate_is_estimated_as_its_configuration_would_be() -> None:
    """The search and estimate-time must not drift apart: same setup, same memory."""
    config = load("medium", {"batch_size": 2, "gradient_accumulation_steps": 4})
    cluster = Cluster(find_device("h100"), 1, 8)
    resolved = resolve(config, 8, "cuda", bf16_supported=True)
    setup, buffers = read_setup(resolved.config, resolved.json, 8, DATA)
    real = estimate_setup(resolved.config, setup, buffers, cluster, DATA, 64)
    same = next(
        c
        for c in candidates(config, cluster, DATA, 64, "bf16")
        if (c.setup.stage, c.setup.micro_batch, c.setup.checkpoint_every, c.setup.offload_optimizer) == (2, 2, 0, False)
    )
    assert same.setup == real.setup
    assert same.speed == real.speed
    assert buffers.reduce_bucket == buffers_for(config).reduce_bucket
