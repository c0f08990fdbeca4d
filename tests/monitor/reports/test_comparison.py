"""The comparison of runs: who is best, in what they differ, and what the cards and curves say of each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from lumina.config import ModelConfig
from lumina.monitor.reports.comparison import duration, parameters
from lumina.monitor.reports.html import render
from lumina.monitor.reports.run_data import RunData, read
from tests.browser import document_after, needs_browser
from tests.monitor.recorded import record_run


def cells(html: str, title: str) -> list[list[str]]:
    """The rows of the first table under a heading, as text; "BEST" before a marked one."""
    table = html.split(f"<h2>{title}</h2>")[1].split("</table>")[0]
    rows = re.findall(r"<tr( class=\"best\")?>(.*?)</tr>", table)
    texts = [(marked, [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)])
             for marked, row in rows]  # fmt: skip
    return [[*(["BEST"] if marked else []), *row] for marked, row in texts]


def with_losses(folder: Path, losses: dict[int, float], **config: Any) -> RunData:
    run = record_run(folder, 100, starts=1, **config)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [record for record in records if record["kind"] != "eval"]
    kept += [{"kind": "eval", "step": step, "loss": loss, "ppl": 1.0, "seconds": 1.0} for step, loss in losses.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    return read(run)


def test_the_runs_are_ranked_and_the_best_is_marked(tmp_path: Path) -> None:
    runs = [
        with_losses(tmp_path / "worse", {50: 3.0, 100: 2.5}),
        with_losses(tmp_path / "none", {}),
        with_losses(tmp_path / "better", {50: 2.25, 100: 2.75}, learning_rate=3e-4),
    ]
    html = render(runs)
    head, first, second, third = cells(html, "Ranking")
    assert head[:3] == ["run", "best evaluation loss", "at step"]
    assert first[:4] == ["BEST", "better (best)", "2.2500", "50"]
    assert second[:3] == ["worse", "2.5000", "100"]
    assert third[:3] == ["none", "none", ""]
    assert first[6] == f"{100 * 65536:,}"  # tokens of the steps
    # In what they differ stands before all else; their names and folders are no difference.
    differing = cells(html, "Settings that differ")
    assert [row[0] for row in differing] == ["differs", "learning_rate"]
    assert html.index("Settings that differ") < html.index('class="card"') < html.index("<h2>Learning</h2>")
    assert "losses do not compare" not in html
    other = with_losses(tmp_path / "other", {50: 1.0}, eval_data=["other.jsonl"])
    assert "eval_data differ, so the losses do not compare" in render([runs[0], other])


def test_the_card(tmp_path: Path) -> None:
    run = record_run(tmp_path / "run", 100, starts=2, train_data=["some/where/chats.jsonl", "more.jsonl"])
    told = json.loads((run / "run.json").read_text())
    # The first start ended after an hour and a bit; the second was killed 40 s after it began, by its last step's time.
    told["starts"][0] |= {"time": 1.7e9 - 5000, "end": {"time": 1.7e9 - 1000, "state": "stopped", "step": 50}}
    told["starts"][1] |= {"time": 1.7e9 + 60}
    (run / "run.json").write_text(json.dumps(told))
    html = render([read(run)])
    card = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert card["tokens seen"] == "6,553,600"
    assert card["duration"] == "1 h 07 min"  # 4000 s and 40 s
    assert card["data"] == "chats.jsonl, more.jsonl, fingerprint 0123456789abcdef"
    assert card["parameters"] == parameters(read(run))
    assert "Ranking" not in html


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (7260, "2 h 01 min")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_parameters_are_transformers(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 100_352}
    run = read(record_run(tmp_path / "run", 20, **shape))
    config = ModelConfig.model_validate({k: v for k, v in run.config.items() if k in ModelConfig.model_fields})
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100_352, hidden_size=64, intermediate_size=config.ffn_size, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=config.tie_word_embeddings,
        )
    )  # fmt: skip
    assert parameters(run) == f"{theirs.num_parameters() / 1e6:.1f} M"
    run.config["num_heads"] = "many"
    assert parameters(run) == "unknown"


_LOOK = """
const out = document.createElement("pre");
out.id = "found";
const say = (what, value) => { out.textContent += what + "=" + JSON.stringify(value) + "\\n"; };
const chart = (title) => document.querySelector(`[data-title="${title}"]`);
const legend = (title) => [...chart(title).querySelectorAll(".legend > span")].map((item) => item.textContent);
const chips = (title) => [...chart(title).querySelectorAll(".legend .chip")].map((one) => getComputedStyle(one).color);
const drawn = (title) => {  // opaque pixels by colour
  const canvas = chart(title).querySelector("canvas"), found = {};
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  for (let at = 0; at < data.length; at += 4) if (data[at + 3] === 255) {
    const colour = `rgb(${data[at]}, ${data[at + 1]}, ${data[at + 2]})`;
    found[colour] = (found[colour] || 0) + 1;
  }
  return found;
};
setTimeout(() => {
  say("loss", legend("Training loss"));
  say("rate", legend("Learning rate"));
  say("chips", chips("Training loss"));
  say("drawn", drawn("Training loss"));
  say("units", [...document.querySelectorAll("body")].map((one) => /\\d [KMGT]B\\b/.test(one.innerText)));
  say("wide", document.documentElement.scrollWidth <= innerWidth);
  document.body.append(out);
}, 300);
"""


def looked_at(folder: Path, runs: list[RunData], width: int = 1200) -> dict[str, Any]:
    document, messages = document_after(folder, render(runs), _LOOK, width)
    assert messages == []
    found = document.split('<pre id="found">')[1].split("</pre>")[0]
    return {name: json.loads(value) for name, value in (line.split("=", 1) for line in found.strip().splitlines())}


@needs_browser
def test_legends_swatches_and_points(tmp_path: Path) -> None:
    """A run of one step is a point that is seen; every curve has a name, and an evaluation a colour of its own."""
    one = read(record_run(tmp_path / "one", 1, starts=1))
    found = looked_at(tmp_path / "alone", [one])
    assert found["loss"] == ["training", "evaluation"]
    assert found["rate"] == ["Learning rate"]
    training, evaluation = found["chips"]
    assert training != evaluation
    assert found["drawn"].get(training, 0) >= 20, "no point of the lone step"
    assert found["drawn"].get(evaluation, 0) >= 20, "no point of the lone evaluation"
    assert found["wide"]
    other = read(record_run(tmp_path / "other", 60, seed=1))
    found = looked_at(tmp_path / "both", [one, other], 390)
    assert found["loss"] == ["one, training", "other, training", "one, evaluation", "other, evaluation"]
    assert found["rate"] == ["one", "other"]
    assert len(set(found["chips"])) == 4
    assert found["wide"]
