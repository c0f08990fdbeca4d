"""Every token predicted once, summed by role and turn, against a plain forward pass per conversation."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from lumina.chat import Conversation, Message, Tokenizer, render
from lumina.cli import main
from lumina.infer import Loaded, load
from lumina.infer.evaluation.loss import ScoringWindow, evaluate, predict, read_conversations
from tests.infer.small_models import as_transformers, make_model, write_run

TOKENIZER = Tokenizer.load()
CONVERSATIONS = [
    Conversation([Message("user", "Hello"), Message("assistant", "Hi, how are you?")]),
    Conversation([Message("system", "Be kind."), Message("user", "Why?"), Message("assistant", "Because 日本.")]),
    Conversation([Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "")]),
]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded(make_model(seed=8), TOKENIZER, Path("step-00000001"), 1)


def nats_of(llama: object, ids: list[int]) -> torch.Tensor:
    """Cost of tokens 1, 2, … by transformers, float64."""
    with torch.no_grad():
        logits = llama(torch.tensor([ids])).logits[0, :-1].double()  # type: ignore[operator]
    return -logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_sums_equal_a_plain_pass_over_each_conversation(loaded: Loaded) -> None:
    llama, nats, tokens, sizes = as_transformers(loaded.model), Counter[str](), Counter[str](), Counter[str]()
    for conversation in CONVERSATIONS:
        ids, _, offsets = render(TOKENIZER, conversation)
        costs, turn = nats_of(llama, ids.tolist()), 0
        for number, message in enumerate(conversation.messages):
            turn += message.role == "assistant"
            cost = costs[offsets[number] + 1 : offsets[number + 1] - 1]  # past <|im_start|> and the role, to the end
            for key in (message.role, f"{message.role} {turn}"):
                nats[key] += float(cost.sum())  # type: ignore[assignment]
                tokens[key] += len(TOKENIZER.encode(message.content)) + 1
                sizes[key] += len(message.content.encode())
    result = evaluate(loaded, CONVERSATIONS)
    assert result.conversations == 3
    assert set(result.roles) == {"user", "assistant", "system"}
    for name, score in [*result.roles.items(), *((f"assistant {turn}", s) for turn, s in result.turns.items())]:
        assert score.nats == pytest.approx(nats[name], rel=1e-5)
        assert (score.tokens, score.bytes) == (tokens[name], sizes[name])
    facts = result.to_dict()
    assert facts["loss"] == pytest.approx(nats["assistant"] / tokens["assistant"], rel=1e-5)
    assert facts["perplexity"] == pytest.approx(math.exp(facts["loss"]))
    assert facts["bits_per_byte"] == pytest.approx(nats["assistant"] / math.log(2) / sizes["assistant"], rel=1e-5)


def test_the_batch_does_not_change_the_result(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    conversations = CONVERSATIONS * 5
    together = evaluate(loaded, conversations).to_dict()
    monkeypatch.setattr("lumina.infer.evaluation.loss._TOKENS_AT_ONCE", 20)
    monkeypatch.setattr("lumina.infer.evaluation.loss._ROWS_AT_ONCE", 7)
    apart = evaluate(loaded, conversations).to_dict()
    assert apart["loss"] == pytest.approx(together["loss"], rel=1e-6)
    assert apart["by_turn"]["1"]["tokens"] == together["by_turn"]["1"]["tokens"]


def test_a_long_conversation_is_predicted_whole_each_token_once(loaded: Loaded) -> None:
    words = " ".join(f"word{number}" for number in range(120))
    conversation = Conversation([Message("user", "Tell me."), Message("assistant", words)])
    ids, mask, _ = render(TOKENIZER, conversation)
    result = evaluate(loaded, [conversation])
    assert result.cut == len(ids) // 127
    assert result.roles["assistant"].tokens == int(mask.sum())
    llama, total = as_transformers(loaded.model), 0.0
    for start in range(0, len(ids) - 1, 127):
        window = ids[start : start + 128].tolist()
        total += float((nats_of(llama, window) * torch.from_numpy(mask[start + 1 : start + 128])).sum())
    assert result.roles["assistant"].nats == pytest.approx(total, rel=1e-5)


def test_answers_by_how_many_tokens_come_before(loaded: Loaded) -> None:
    """Counted token by token, in conversations that fit a window of 128 and one that is cut into several."""
    words = " ".join(f"word{number}" for number in range(120))
    conversations = [*CONVERSATIONS, Conversation([Message("user", "Tell me."), Message("assistant", words)])]
    llama, nats, tokens = as_transformers(loaded.model), Counter[int](), Counter[int]()
    for conversation in conversations:
        ids, mask, _ = render(TOKENIZER, conversation)
        for start in range(0, len(ids) - 1, 127):
            window = ids[start : start + 128].tolist()
            for before, cost in enumerate(nats_of(llama, window).tolist(), 1):
                if mask[start + before]:
                    lowest = next(low for low in (64, 32, 16, 8, 4, 2, 1) if before >= low)
                    nats[lowest] += cost  # type: ignore[assignment]
                    tokens[lowest] += 1
    found = evaluate(loaded, conversations)
    places = found.to_dict()["by_position"]
    assert [(one["from"], one["to"], one["tokens"]) for one in places] == [
        (low, 2 * low - 1, tokens[low]) for low in sorted(tokens)
    ]
    assert min(tokens) < 8 < 64 in tokens, "of near positions and of far ones"
    for one in places:
        assert one["loss"] == pytest.approx(nats[one["from"]] / tokens[one["from"]], rel=1e-5)
    assert sum(one["tokens"] for one in places) == found.roles["assistant"].tokens


def test_the_command_counts_what_it_skips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", make_model(num_layers=1))
    good = {"messages": [{"role": "human", "content": "Hi"}, {"role": "bot", "content": "Hello"}]}
    lines = [json.dumps(good), "{broken", "", json.dumps({"messages": []}), json.dumps(good)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    line = ["evaluate", str(run), "--data", str(tmp_path / "data.jsonl")]
    assert main([*line, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["conversations"] == 2
    assert sum(facts["skipped"].values()) == 2
    assert facts["by_role"]["assistant"]["messages"] == 2
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert f"{facts['loss']:.4f}" in shown
    assert all(f"{one['from']} to {one['to']}" in shown for one in facts["by_position"])
    assert "skipped, broken JSON: 1" in shown


def test_nothing_to_evaluate_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", make_model(num_layers=1))
    (tmp_path / "bad.jsonl").write_text("{broken\n")
    assert main(["evaluate", str(run), "--data", str(tmp_path / "bad.jsonl")]) == 2
    assert "no assistant message to evaluate on" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--data", str(tmp_path / "none.jsonl")]) == 2
    assert "does not exist" in capsys.readouterr().err
    skipped: Counter[str] = Counter()
    assert list(read_conversations([str(tmp_path / "bad.jsonl")], skipped)) == []
    assert skipped == {"broken JSON": 1}


@torch.inference_mode()
def test_a_long_window_has_its_feed_forward_in_tiles(tmp_path: Path) -> None:
    """What the feed-forward has inside does not grow with the window; the losses are the same."""
    model = make_model(seed=8, seq_length=16384)
    loaded = load(write_run(tmp_path / "run", model), precision="fp32")
    seen: list[int] = []
    for block in loaded.model.blocks:
        block.feed_forward.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[:2].numel()))
    ids = torch.randint(2000, (4301,), generator=torch.Generator().manual_seed(2)).tolist()
    (tiled,) = predict(loaded.model, [ScoringWindow(ids, 4290)])
    assert max(seen) <= 4096
    assert sum(seen) == 4300 * len(loaded.model.blocks)
    (whole,) = predict(model.eval(), [ScoringWindow(ids, 4290)])
    torch.testing.assert_close(tiled.nats_N, whole.nats_N, rtol=1e-5, atol=1e-5)
    seen.clear()
    list(predict(loaded.model, [ScoringWindow(ids[:2000], 1990)]))
    assert seen == [1999] * len(loaded.model.blocks), "a short one is one piece"
