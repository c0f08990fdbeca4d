"""The report of runs: nothing lost in thinning, a real browser's view of it, and its size."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina import cli
from lumina.config import UserError
from lumina.monitor.reports.html import render
from lumina.monitor.reports.run_data import Group, read, thinned
from tests.browser import browse, document_after, needs_browser
from tests.monitor.recorded import HOSTILE, record_run


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


@given(
    st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=400),
    st.integers(min_value=1, max_value=50),
)
@settings(deadline=None, max_examples=60)
def test_thinning_keeps_every_extreme(values: list[float | None], buckets: int) -> None:
    thin = thinned(Group(list(range(len(values))), {"a": values}), buckets)
    kept = [value for value in thin.columns["a"] if value is not None]
    given_values = [value for value in values if value is not None]
    assert len(thin.x) == len(thin.columns["a"]) <= max(len(values), 2 * buckets)
    assert all(low < high for low, high in pairwise(thin.x))
    assert bool(kept) == bool(given_values)
    if kept:
        assert max(kept) == pytest.approx(max(given_values), rel=1e-4)
        assert min(kept) == pytest.approx(min(given_values), rel=1e-4)


def test_a_single_spike_among_many_steps_is_in_the_report(tmp_path: Path) -> None:
    run = record_run(tmp_path / "run", 9000, spike=4321)
    group = data_of(render([read(run)]))["runs"][0]["groups"]["step"]
    place = group["columns"]["loss"].index(50)
    assert abs(group["x"][place] - 4321) <= 9000 / 1000


def test_what_is_there(tmp_path: Path) -> None:
    one = record_run(tmp_path / "one", 200)
    two = record_run(tmp_path / "two", 100, learning_rate=3e-4, starts=1)
    html = render([read(one), read(two)])
    data = data_of(html)
    titles = [chart["title"] for chart in data["charts"]]
    for wanted in ("Training loss", "Evaluation loss", "Learning rate", "Gradient norm", "Tokens/s", "Processes"):
        assert titles.count(wanted) == 1
    assert {"Seconds of a step · one", "Update ratio · two", "GPU temperature · one"} <= set(titles)
    assert "Model FLOPs utilisation" not in titles  # no device, no figure
    # Events and restarts are marks with their text; an uneventful save is not.
    marks = [(mark["step"], mark["level"]) for mark in data["runs"][0]["marks"]]
    assert sorted(marks) == [(50, "info"), (50, "warn"), (66, "start"), (100, "crit"), (133, "start")]
    assert any("lost a node" in mark["text"] for mark in data["runs"][0]["marks"])
    layers = data["runs"][0]["groups"]["layers"]["columns"]
    ratio, update = layers["layers/blocks.1/update_ratio"], layers["layers/blocks.1/update"]
    assert ratio == pytest.approx([value / 6 for value in update], rel=1e-3)
    world = data["runs"][0]["groups"]["world"]
    assert (world["x"], world["columns"]["processes"]) == ([0, 66, 133, 200], [8, 4, 2, 2])
    # What differs between the runs, and nothing else.
    differs = html.split("<th>differs</th>")[1].split("</table>")[0]
    assert re.findall(r"<tr><td>(\w+)</td>", differs) == ["learning_rate"]
    # Text from users cannot become markup.
    assert HOSTILE not in html
    assert html.count("<script") == html.count("</script>") == 3


def test_loss_by_position(tmp_path: Path) -> None:
    """Of one run the first, the best and the newest evaluation, of several the newest; none of a run without."""
    one, two = record_run(tmp_path / "one", 200), record_run(tmp_path / "two", 100)
    metrics = two / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    evaluations = [record for record in records if record["kind"] == "eval"]
    evaluations[3]["loss"] = 1.0
    evaluations[-1]["by_position"].append({"from": 1 << 21, "to": (1 << 22) - 1, "loss": None, "tokens": 3})
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))

    def rows(*runs: Path) -> list[list[str]]:
        found = render([read(run) for run in runs]).split("Evaluation loss by position")[1].split("</table>")[0]
        return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in found.split("<tr>")[1:]]

    steps = [evaluations[place]["step"] for place in (0, 3, -1)]
    titles = [f"{name}, step {step}" for name, step in zip(("first", "best", "newest"), steps, strict=True)]
    top, *_, last = rows(two)
    assert top == ["tokens before", *titles, "tokens"]
    place = evaluations[0]["by_position"][-1]
    losses = [f"{evaluations[place]['by_position'][20]['loss']:.4f}" for place in (0, 3, -1)]
    assert last == [f"{place['from']:,} to {place['to']:,}", *losses, f"{place['tokens']:,}"]
    assert rows(one, two)[0] == ["tokens before", "one, step 200", "one, tokens", "two, step 100", "two, tokens"]
    evaluations[0].pop("by_position")  # as an earlier version has recorded it
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert rows(two)[0][1] == f"first recorded, step {evaluations[1]['step']}"
    for record in records:
        record.pop("by_position", None)
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "loss by position" not in render([read(two)])
    assert rows(one, two)[0] == ["tokens before", "one, step 200", "one, tokens"]


def test_a_run_of_version_0_1_0(tmp_path: Path) -> None:
    """Its events are marked as today's are, its settings have today's names."""
    run = record_run(tmp_path / "one", 200)
    now = render([read(run)])
    events = run / "events.jsonl"
    events.write_text(events.read_text().replace('"kind": "recovery"', '"kind": "answer"'))
    kept = json.loads((run / "run.json").read_text())
    assert kept["config"].pop("on_spike") == "skip"
    kept["config"]["answer_spike"] = "skip"
    (run / "run.json").write_text(json.dumps(kept))
    marks = [data_of(html)["runs"][0]["marks"] for html in (now, render([read(run)]))]
    assert marks[0] == marks[1]
    assert "<td>on_spike</td>" in render([read(run)])


def test_steps_taken_again_belong_to_the_later_start(tmp_path: Path) -> None:
    run = record_run(tmp_path / "run", 100, starts=2)
    told = json.loads((run / "run.json").read_text())
    told["starts"][1]["step"] = 0
    (run / "run.json").write_text(json.dumps(told))
    assert read(run).groups["world"].columns["processes"] == [4, 4]


def test_three_long_runs_are_under_3_mb(tmp_path: Path) -> None:
    runs = [record_run(tmp_path / name, 12_000, layers=48, seed=i) for i, name in enumerate("abc")]
    assert len(render([read(run) for run in runs]).encode()) < 3e6


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = record_run(tmp_path / "run", 20)
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.html").exists()
    assert cli.main(["report", str(run), str(run), "--out", str(tmp_path / "both.html")]) == 0
    assert "both.html" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "is not a run's folder" in capsys.readouterr().err
    assert cli.main(["report", str(run), "--out", str(tmp_path / "no" / "x.html")]) == 2


def test_a_run_from_before_run_json(tmp_path: Path) -> None:
    run = record_run(tmp_path / "run", 20)
    for name in ("run.json", "events.jsonl", "samples.jsonl"):
        (run / name).unlink()
    html = render([read(run)])
    assert "set sample_prompts" in html
    assert "learning_rate" in html
    with pytest.raises(UserError):
        read(tmp_path / "nothing")


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_the_report_in_a_browser(tmp_path: Path, width: int, dark: bool) -> None:
    """No console message, no request, and pixels of the curves' colours."""
    from PIL import Image

    runs = [record_run(tmp_path / name, 400, seed=i) for i, name in enumerate(("one", "two"))]
    picture, messages, requests = browse(tmp_path / "report", render([read(run) for run in runs]), width, dark)
    assert messages == []
    assert requests == []
    image = Image.open(picture).convert("RGB")
    colours = {colour: count for count, colour in image.getcolors(1 << 24)}
    curves = ((0x6E, 0xA8, 0xE6), (0xF5, 0x9E, 0x6B)) if dark else ((0x2F, 0x6D, 0xB3), (0xC2, 0x41, 0x0C))
    background = (0x16, 0x18, 0x1B) if dark else (0xFB, 0xFB, 0xF9)
    assert all(colours.get(curve, 0) > 200 for curve in curves), "no curves to be seen"
    assert colours.get(background, 0) > 10_000


_USE = """
const out = document.createElement("pre");
out.id = "found";
const chart = document.querySelector('[data-title="Training loss"]');
const say = (what, value) => { out.textContent += what + "=" + value + "\\n"; };
const over = () => chart.querySelector(".u-over");
const send = (kind, x, y, more = {}) => {
  const box = over().getBoundingClientRect();
  const event = { bubbles: true, clientX: box.left + x * box.width, clientY: box.top + y * box.height, ...more };
  (kind === "mouseup" ? document : over()).dispatchEvent(new MouseEvent(kind, event));
};
const hover = (x) => { send("mouseenter", x, .5); send("mousemove", x, .5); };
const tip = () => [...chart.querySelector(".tip").children].map((row) => row.textContent).join("|");
chart.classList.add("hovered");
const settle = () => new Promise((done) => setTimeout(done, 200));
(async () => {
  await settle(); hover(.25); await settle(); say("quarter", tip());
  chart.querySelector("button").click();
  say("log", chart.querySelector("button").getAttribute("aria-pressed"));
  await settle(); hover(.25); await settle(); say("logged", tip());
  send("mousemove", .5, .5); send("mousedown", .5, .5, { button: 0 });
  send("mousemove", .75, .5, { movementX: 9 }); send("mouseup", .75, .5);
  await settle(); hover(.001); await settle(); say("zoomed", tip());
  document.getElementById("reset").click();
  await settle(); hover(.001); await settle(); say("whole", tip());
  say("wide", document.documentElement.scrollWidth <= innerWidth);
  document.body.append(out);
})();
"""


@needs_browser
@pytest.mark.parametrize("width", [1200, 390])
def test_values_under_the_pointer_zoom_and_log_axis(tmp_path: Path, width: int) -> None:
    run = record_run(tmp_path / "run", 400)
    losses = {
        record["step"]: record["loss"]
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == "step"
    }
    document, messages = document_after(tmp_path / "used", render([read(run)]), _USE, width)
    assert messages == []
    found = dict(re.findall(r"^(\w+)=(.*)$", document.split('<pre id="found">')[1].split("</pre>")[0], re.MULTILINE))
    for name in ("quarter", "logged"):
        step, loss = re.match(r"step (\d+)\|([\d.]+) training", found[name]).groups()  # type: ignore[union-attr]
        assert abs(int(step) - 100) <= 8
        assert float(loss) == pytest.approx(losses[int(step)], rel=1e-3)
        assert "loss_spike" in found[name]  # the event at step 100
    assert found["log"] == "true"
    assert abs(int(re.match(r"step (\d+)", found["zoomed"])[1]) - 200) <= 8  # type: ignore[index]
    assert int(re.match(r"step (\d+)", found["whole"])[1]) <= 8  # type: ignore[index]
    assert found["wide"] == "true", "the page is wider than its window"
