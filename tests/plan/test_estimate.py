"""Counted work, speed, and the whole estimate."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lumina import cli
from lumina.config import UserError, load
from lumina.plan.costs.devices import Cluster, device_names, find_device
from lumina.plan.costs.memory import states
from lumina.plan.costs.setup import Setup
from lumina.plan.costs.speed import HOST_LINK, exchange_seconds, link_rate, predict
from lumina.plan.costs.workload import flops_per_token, traffic
from lumina.plan.estimate import assumed_data, estimate_run
from lumina.plan.published import MODELS, RUNS, document, median_error

ROOT = Path(__file__).parents[2]


def test_flops_are_what_pytorch_counts() -> None:
    """torch's FlopCounterMode over the real model: matrix products of the layers and the output layer. Attention is
    left out here (PyTorch counts it without the causal half) and checked by hand below."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lumina.model import Transformer, transformer

    config = load("nano")
    tokens = 64
    with torch.device("meta"):
        model = Transformer(config)
        ids = torch.zeros(1, tokens, dtype=torch.long)
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(transformer, "attention", lambda q, k, v, *rest: q)
        model(ids, ids)
    ours = flops_per_token(config, Setup(1, 1, 1, "bf16"))
    assert counter.get_total_flops() == tokens * (ours.layers + ours.output)


def test_attention_flops_by_hand() -> None:
    config = load("nano")
    length = 5
    pairs = sum(position + 1 for position in range(length))  # keys that each query sees
    # Two products (scores, values) of 2 * head_dim FLOPs a pair and head.
    by_hand = config.num_layers * config.num_heads * pairs * 2 * (2 * config.head_dim)
    ours = flops_per_token(config, Setup(1, 1, 1, "bf16", document_tokens=length)).attention
    assert ours * length == by_hand
    # A document is never longer than the window.
    longest = flops_per_token(config, Setup(1, 1, 1, "bf16", document_tokens=1e9)).attention
    assert longest == flops_per_token(config, Setup(1, 1, 1, "bf16")).attention


def test_unsupervised_positions_cost_no_output_layer() -> None:
    config = load("debug")
    all_of_them, half = (flops_per_token(config, Setup(1, 1, 1, "bf16", supervised=share)) for share in (1.0, 0.5))
    assert half.output == all_of_them.output / 2
    assert (half.layers, half.attention) == (all_of_them.layers, all_of_them.attention)


@pytest.mark.parametrize(
    ("stage", "scatter", "whole_copies"),
    [(0, False, 2), (1, False, 2 + 1), (2, False, 3 * 2 + 1), (3, False, 3 * 3), (1, True, 2), (2, True, 3 + 1)],
)
def test_traffic_is_the_zero_papers(stage: int, scatter: bool, whole_copies: int) -> None:
    """In units of one copy of the weights, for three micro-batches and infinitely many ranks: all-reduce 2; ZeRO 1 a
    reduction and a gather; ZeRO 2 a reduction each micro-batch and a gather; ZeRO 3 three of them each micro-batch.
    A reduction is an all-reduce under DeepSpeed's stages 1 and 2, half of one where each rank gets its share alone."""
    config = load("small")
    world = 10**9
    moved = traffic(config, Setup(2, 3, world, "bf16", stage, reduce_scatter=scatter))
    assert moved.total == pytest.approx(whole_copies * 2 * config.num_parameters(), rel=1e-6)
    assert traffic(config, Setup(2, 3, 1, "bf16", stage)).total == 0


def test_hpz_gathers_for_the_backward_pass_within_the_node() -> None:
    """In units of one copy of the weights, a micro-batch of infinitely many nodes of eight: a reduction and one gather
    over all, 7/8 of a gather inside. A second copy of the weights, an eighth on each rank, is what it costs."""
    config, copy = load("small"), 2 * load("small").num_parameters()
    plain = Setup(2, 3, 8 * 10**6, "bf16", 3)
    moved, before = traffic(config, replace(plain, hpz=8)), traffic(config, plain)
    assert (moved.gradients, 2 * moved.weights) == (before.gradients, before.weights)
    assert moved.near == pytest.approx(3 * copy * 7 / 8)
    more = states(config, replace(plain, hpz=8)).weights - states(config, plain).weights
    assert more == pytest.approx(copy / 8, rel=1e-4)


def test_links() -> None:
    device = find_device("h100")
    one, two = (link_rate(Cluster(device, nodes, 8)) for nodes in (1, 2))
    assert one >= two > 0  # eight adapters feed a node faster than NVLink takes it
    assert device.network is not None
    # Across two nodes of one GPU each every byte crosses the one adapter.
    assert link_rate(Cluster(device, 2, 1)) == pytest.approx(0.8 * device.network)
    with pytest.raises(UserError, match="network of nodes with l40s is not known"):
        link_rate(Cluster(find_device("l40s"), 2, 8))


def test_published_runs() -> None:
    assert len({(case.model, case.device, case.gpus) for case in RUNS}) >= 8
    assert median_error() < 0.15


def test_other_trainers_are_not_charged_the_copy_of_values_that_lumina_alone_makes() -> None:
    """A step of MPT 3B with it, which reads and writes two bytes of every value in the backward pass of each layer."""
    run = next(each for each in RUNS if each.model == "MPT 3B" and each.device == "a100-40gb")
    device, tokens = find_device(run.device), run.micro_batch * 2048
    setup = Setup(run.micro_batch, 1, run.gpus, "bf16", run.stage)
    own = predict(MODELS[run.model], setup, Cluster(device, run.gpus // 8, 8), elementwise_factor=2.8, attention=0.31)
    copy = 2.8 * tokens * 32 * 2560 * (2 + 2) / (0.85 * device.bandwidth)
    assert run.predicted() == pytest.approx(tokens / (own.step - copy), rel=1e-9)
    assert copy > 0.005 * own.step


def test_the_document_is_up_to_date() -> None:
    assert (ROOT / "docs" / "plan.md").read_text(encoding="utf-8") == document()


@pytest.mark.parametrize(
    "name", ["h100", "H100", "NVIDIA H100 80GB HBM3", "a100", "NVIDIA A100-SXM4-80GB", "a100_40gb"]
)
def test_device_names(name: str) -> None:
    assert find_device(name).name in {"h100", "a100-80gb", "a100-40gb"}


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(UserError, match=r"`h1000`. Did you mean `h100`\?"):
        find_device("h1000")
    with pytest.raises(UserError, match="Known: "):
        find_device("tpu")


def test_every_figure_has_a_source() -> None:
    for name in device_names():
        device = find_device(name)
        assert len(device.sources) == 3
        assert all(len(source) > 10 for source in device.sources)
        assert 0 < device.attention <= device.matmul < 1


def test_no_rate_above_the_peak() -> None:
    config = load("large")
    for name in device_names():
        for stage in range(4):
            speed = predict(config, Setup(1, 2, 8, "bf16", stage), Cluster(find_device(name), 1, 8))
            assert 0 < speed.mfu < 1
            assert speed.step >= speed.products
            assert 0 <= speed.exposed <= speed.communication


def test_a_precision_that_the_device_lacks() -> None:
    device = replace(find_device("a100"), peak={"fp16": 1e14})
    with pytest.raises(UserError, match="has no bf16"):
        predict(load("nano"), Setup(1, 1, 1, "bf16"), Cluster(device))


def test_duration_follows_from_the_steps() -> None:
    config = load("small", {"epochs": 3, "batch_size": 2, "gradient_accumulation_steps": 4})
    run = estimate_run(config, Cluster(find_device("a100"), 1, 8), assumed_data(config, 1e6, None, 1.0))
    assert run.global_batch == 64
    assert run.steps == 3 * 8  # 1e6 tokens = 488.3 windows of 2048 = 7.6 batches of 64
    assert run.seconds == pytest.approx(24 * run.speed.step)
    assert run.gpu_hours == pytest.approx(8 * run.seconds / 3600)
    limited = estimate_run(
        config.replace(max_steps=5), Cluster(find_device("a100")), assumed_data(config, 1e6, None, 1.0)
    )
    assert limited.steps == 5


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = cli.main(["estimate-time", *argv])
    return code, capsys.readouterr().out


def test_text_and_json_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--config", "large", "--gpu", "a100-40gb", "--nodes", "2", "--gpus-per-node", "8", "--price", "2"]
    code, text = shown(capsys, *argv)
    code_json, raw = shown(capsys, *argv, "--json")
    (run,) = json.loads(raw)["runs"]
    assert code == code_json == (0 if run["fits"] else 1)
    assert run["cost"] == pytest.approx(2 * run["gpu_hours"])
    assert f"{run['tokens_per_second']:,.0f} tokens/s" in text
    assert ("DOES NOT FIT" in text) is not run["fits"]
    total = sum(size for part, size in run["memory"].items() if part not in ("total", "host", "device", "peak_at"))
    assert run["memory"]["total"] == pytest.approx(total)
    assert list(run["memory_by_stage"]) == ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]


def test_stage_comes_from_the_json_or_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    def stage(*argv: str) -> Any:
        return json.loads(shown(capsys, "--gpu", "h100", "--gpus-per-node", "8", "--json", *argv)[1])["runs"][0][
            "shape"
        ]

    assert stage()["stage"] == 1
    assert stage("--zero", "3")["stage"] == 3
    offloaded = stage("--ds_config", str(ROOT / "ds_configs" / "zero3_offload.json"))
    assert (offloaded["stage"], offloaded["offload_optimizer"], offloaded["offload_params"]) == (3, True, True)
    code = cli.main(["estimate-time", "--gpu", "h100", "--zero", "3", "--ds_config", "x.json"])
    assert code == 2


def test_tokens_are_counted_in_the_training_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine, and you?"}]
    line = json.dumps({"messages": turns})
    (tmp_path / "train.jsonl").write_text("\n".join([line] * 300) + "\n", encoding="utf-8")
    argv = ["--config", "nano", "--gpu", "h100", "--train-data", str(tmp_path / "train.jsonl"), "--json"]
    _, raw = shown(capsys, *argv, "--cache-dir", str(tmp_path / "cache"))
    data = json.loads(raw)["data"]
    from lumina.chat import Conversation, Message, Tokenizer, render

    rendered = render(Tokenizer.load(), Conversation([Message(t["role"], t["content"]) for t in turns]))
    assert data["tokens"] == 300 * len(rendered.ids)
    assert data["document_tokens"] == len(rendered.ids)
    assert data["supervised"] == pytest.approx(int(rendered.mask.sum()) / len(rendered.ids))


def test_the_originals_line_without_a_gpu_names_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "main.py", "--estimate-time", "--config", "medium"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={"PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert re.search("no --gpu given and none that is known here: shown for a100-80gb and h100", done.stdout)
    assert done.stdout.count("tokens/s") == 2


@pytest.mark.parametrize("name", ["T4", "Tesla T4", "V100", "Tesla V100-SXM2-32GB", "mi300x"])
def test_devices_without_published_rates_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UserError, match="no published rate of training"):
        find_device(name)


@pytest.mark.parametrize(
    ("product", "key"),
    [
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("rtx5090", "rtx-5090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_devices_by_the_name_that_nvidia_smi_gives_them(product: str, key: str) -> None:
    assert find_device(product).name == key


@pytest.mark.parametrize(("device", "within"), [("a100", "25%"), ("h100", "25%"), ("rtx4090", "50%"), ("b200", "50%")])
def test_a_device_that_no_published_run_stands_beside_is_less_certain(
    capsys: pytest.CaptureFixture[str], device: str, within: str
) -> None:
    text, raw = shown(capsys, "--config", "nano", "--gpu", device), shown(capsys, "--gpu", device, "--json")[1]
    assert f"(within {within})" in text[1]
    assert json.loads(raw)["runs"][0]["uncertainty"] == float(within[:-1]) / 100


def test_ranks_that_share_rows_read_the_same_samples() -> None:
    """Eight ranks in two groups of four: a step of as many samples as two ranks would read, a quarter of the tokens and
    of the activations on each, weights as over eight ranks."""
    config = load("8b", {"batch_size": 2, "gradient_accumulation_steps": 3, "sequence_parallel_size": 4})
    cluster, data = Cluster(find_device("h100"), 1, 8), assumed_data(config, 1e9, None, 1.0)
    shared, own = (estimate_run(each, cluster, data) for each in (config, config.replace(sequence_parallel_size=1)))
    assert (shared.global_batch, own.global_batch) == (2 * 3 * 2, 2 * 3 * 8)
    assert shared.setup.tokens(config) == own.setup.tokens(config) / 4 == 2 * config.seq_length / 4
    assert shared.steps == pytest.approx(4 * own.steps, rel=0.01)
    assert shared.speed.tokens_per_step == own.speed.tokens_per_step / 4
    assert (shared.memory.master, shared.memory.moments) == (own.memory.master, own.memory.moments)
    assert shared.memory.activations < own.memory.activations / 3


@pytest.mark.parametrize(("ranks", "kv_heads"), [(2, 8), (8, 8), (32, 32)])
def test_exchanges_are_the_bytes_that_the_documentation_names(ranks: int, kv_heads: int) -> None:
    """docs/long-context.md; tests/model/parallel/test_sequence.py holds the formula to what the model sends."""
    config = load("8b")
    setup = Setup(1, 3, ranks, "bf16", 3, sequence_parallel=ranks)
    tokens = config.seq_length / ranks
    each_way = (2 * 32 + 2 * kv_heads) * 128 * (ranks - 1) / ranks * 2
    assert traffic(config, setup).exchanged == 3 * tokens * config.num_layers * 2 * each_way
    again = traffic(config, replace(setup, checkpoint_every=1))
    assert again.exchanged == 3 * tokens * config.num_layers * 3 * each_way
    assert traffic(config, replace(setup, sequence_parallel=1)).exchanged == 0


def test_nothing_hides_exchanges_and_a_network_carries_those_to_other_nodes() -> None:
    config, device = load("8b"), find_device("h100")
    assert device.network is not None
    setup = Setup(1, 1, 16, "bf16", 0, sequence_parallel=8)
    moved = traffic(config, setup)
    inside = predict(config, setup, Cluster(device, 2, 8))
    plain = exchange_seconds(setup, moved, Cluster(device, 2, 8))
    assert plain == moved.exchanged / (0.8 * device.link)
    assert inside.exposed == pytest.approx(inside.communication)  # stage 0: all of it
    assert inside.exchange == plain
    assert inside.communication > plain
    # Groups of eight over nodes of four: four of a rank's seven neighbours are behind the adapters.
    across = exchange_seconds(setup, moved, Cluster(device, 4, 4))
    assert across == pytest.approx(moved.exchanged * 4 / 7 / (0.8 * device.network))
    with pytest.raises(UserError, match="network of nodes with l40s is not known"):
        exchange_seconds(setup, moved, Cluster(find_device("l40s"), 4, 4))


@pytest.mark.parametrize("command", ["estimate-time", "plan"])
def test_ranks_that_share_rows_are_whole_groups(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [command, "--config", "8b", "--gpu", "h100", "--sequence-parallel", "4"]
    assert cli.main([*argv, "--gpus-per-node", "6"]) == 2
    assert "sequence_parallel_size 4 does not divide the number of GPUs, 6" in capsys.readouterr().err
    cli.main([*argv, "--gpus-per-node", "8"])
    text = capsys.readouterr().out
    assert "2 group(s) of 4 ranks" in text
    assert "exchanged for attention" in text
    assert "(attention's exchanges " in text
    if command == "estimate-time":
        cli.main([*argv, "--gpus-per-node", "8", "--json"])
        step = json.loads(capsys.readouterr().out)["runs"][0]["step"]
        assert 0 < step["exchange"] <= step["exposed_communication"]


def test_copies_to_the_host_hide_behind_the_pass_that_they_are_made_in() -> None:
    """A layer's input takes its time over the link to the host once in each direction, and the forward pass, a quarter
    of what is computed where every layer is recomputed, is the shorter. Wide layers take long enough to compute."""
    h100 = Cluster(find_device("h100"))
    for preset, tokens in (("debug", 2048), ("8b", 131_072)):
        config = load(preset, {"seq_length": tokens})
        kept = Setup(1, 2, 1, "bf16", checkpoint_every=1, supervised=0.1)
        plain, moved = (predict(config, replace(kept, activation_offloading=way), h100) for way in (False, True))
        one_way = 2 * config.num_layers * tokens * config.hidden_size * 2 / HOST_LINK
        compute = plain.products + plain.elementwise
        assert moved.copies == pytest.approx(max(0, one_way - compute / 4) + max(0, one_way - 3 * compute / 4))
        assert moved.exposed == plain.exposed + moved.copies
        assert (moved.copies > 0) == (preset == "debug"), (one_way, compute)
