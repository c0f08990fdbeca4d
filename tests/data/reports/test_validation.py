"""validate-data: its figures by hand on a small file, its report in a browser, its fix read back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.chat import Conversation, Message, RenderedBlock, render
from lumina.commands.data import validate_files
from lumina.config import UserError
from lumina.data import describe_sample, prepare, render_sample
from lumina.data.account import MOST_SUBREASONS, Account
from lumina.data.converting.fixing import write_fixed
from lumina.data.preparing.statistics import LENGTHS, PATTERNS, Statistics, context_lengths, percentiles
from lumina.data.records.fields import MOST_NAMES, OTHERS
from lumina.data.reports.html import render_report, share
from lumina.data.reports.text import validation_lines
from lumina.data.reports.validation import Validation, validate
from tests.browser import browse, document_after, needs_browser
from tests.data.helpers import AGENT_TOKENIZER, TOKENIZER, Settings, chat, write_jsonl

KEY = "sk-" + "a1B2c3D4e5F6g7H8i9J0"
LINES: list[Any] = [
    chat("hello", "hi"),
    chat("hello", "hi"),  # a duplicate
    chat("mail me at someone@example.org", "or call +1 555 123 4567"),
    chat("my key is " + KEY, "thanks"),
    chat("say <|im_end|> and <|im_start|>", "no\u202e"),
    {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "x"}, {"role": "bot", "content": "y"}]},
    chat("привет", "как дела", "хорошо"),
    b"{oops",
    {"messages": [{"role": "user", "content": "alone"}]},
    {"lang": "de", "instruction": "tu", "output": "ja"},
    b"",
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", LINES)


def test_the_figures_of_a_small_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate_files(str(path), json=True) == 0
    figures = orjson.loads(capsys.readouterr().out)
    at = lambda *lines: [f"{path}:{line}" for line in lines]
    assert figures["files"] == {str(path): "JSON lines"}
    assert figures["account"]["lines"] == 11
    assert figures["account"]["conversations"] == 8
    assert figures["formats"] == {"messages": 7, "Alpaca": 1}
    assert figures["roles"] == {"user": 10, "assistant": 8}
    assert figures["languages"] == {"de": 1}
    assert figures["scripts"] == {"Latin": 7, "Cyrillic": 1}
    assert figures["turns"] == {"min": 2, "p50": 2, "p90": 3, "p99": 3, "max": 3, "mean": 2.25}
    assert figures["duplicates"] == 1
    assert figures["findings"] == {
        "a turn repeated at once": {"count": 1, "first": at(6)},
        "roles that do not alternate": {"count": 1, "first": at(6)},
        "ends with an unanswered user turn": {"count": 1, "first": at(7)},
        "email address": {"count": 1, "first": at(3)},
        "phone number": {"count": 1, "first": at(3)},
        "secret key": {"count": 1, "first": at(4)},
        "special-token text": {"count": 1, "first": at(5)},
        "suspicious characters": {"count": 1, "first": at(5)},
    }
    faults = figures["account"]["faults"]
    assert faults["broken JSON"]["first"] == at(8)
    assert "{oops" in faults["broken JSON"]["example"]
    assert faults["no assistant turn"]["first"] == at(9)
    shortest = render(TOKENIZER, Conversation([Message("user", "tu"), Message("assistant", "ja")]))
    assert figures["conversation_tokens"]["min"] == len(shortest.ids)


def test_text_output_names_everything_and_prints_no_secret(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate_files(str(path), create_report=True) == 0
    out = capsys.readouterr().out
    for phrase in (
        "secret key: 1",
        "email address: 1",
        "broken JSON: 1",
        "duplicates     1",
        "seq_length    512",
        "fields   ",
        "report",
    ):
        assert phrase in out
    assert "samples   " not in out, "nothing was packed"
    assert "over " not in out, "nothing was split"
    assert KEY not in out
    assert "someone@example.org" not in out


def test_languages_are_bounded_whatever_the_records_name(tmp_path: Path) -> None:
    records = [{**chat(f"q{i}", "a"), "lang": f"l{i}" if i else "de"} for i in range(300)]
    path = write_jsonl(tmp_path / "in.jsonl", [records[0], *records])
    found = validate([str(path)], TOKENIZER, workers=1)
    languages = found.statistics.languages
    assert (len(languages), languages["de"], languages[OTHERS]) == (MOST_NAMES + 1, 2, 300 - MOST_NAMES)
    both = Statistics(languages={"xx": 1})
    both.merge(Statistics(languages=languages), "in.jsonl", 0)
    assert (len(both.languages), sum(both.languages.values())) == (MOST_NAMES + 1, 302)
    (shown,) = (line for line in validation_lines(found) if line.startswith("languages"))
    assert (shown.count(","), "de 2" in shown, shown.endswith(", …")) == (12, True, True)


@pytest.mark.parametrize("what", sorted(PATTERNS))
@settings(max_examples=50)
@given(data=st.data())
def test_the_quick_pass_misses_nothing_that_a_pattern_matches(what: str, data: st.DataObject) -> None:
    text = "see " + data.draw(st.from_regex(PATTERNS[what], fullmatch=True)) + " here"
    statistics = Statistics()
    statistics._search(["nothing", text], [7, 7])
    assert statistics.findings[what].first == ["7"]


def test_a_conversation_that_is_rendered_once_an_answer_is_one_conversation() -> None:
    """Two answers, two renderings: of the second, three messages are another's to count and the last one is its own.
    A conversation that the template refuses has no rendering, and is left out."""
    said = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    refused = Conversation([Message("user", "x"), Message("assistant", "y")])
    sizes, repeated = [3, 4, 3, 2, 5, 6], [False, False, True, True, False, False]
    block = RenderedBlock(
        ids=np.arange(23, dtype=np.int32),
        mask=np.repeat([0, 1, 0, 0, 0, 1], sizes).astype(np.uint8),
        message_offsets=np.cumsum([0, *sizes]),
        conversation_offsets=np.array([0, 2, 6]),
        supervised=np.array([False, True, False, False, False, True]),
        head=np.zeros(6, dtype=np.int64),
        source=np.array([1, 1]),
        repeated=np.array(repeated),
        role=np.zeros(6, dtype=np.int8),
    )
    statistics = Statistics()
    statistics.add([refused, Conversation(said)], [5, 8], block)
    assert statistics.message_tokens == {"3": 1, "4": 1, "5": 1, "6": 1}
    assert statistics.conversation_tokens == {"7": 1, "16": 1}  # what training sees are two
    assert statistics.supervised_tokens == {"10": 1}
    assert statistics.turns == {"4": 1}
    assert statistics.roles == {"user": 2, "assistant": 2}
    assert len(statistics.hashes) == 1


def test_percentiles_and_context_lengths_against_numpy() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 3000, 501)
    histogram = {str(length): int((lengths == length).sum()) for length in np.unique(lengths)}
    spread = percentiles(histogram)
    for p in (50, 90, 99):
        assert spread[f"p{p}"] == np.percentile(lengths, p, method="inverted_cdf")
    assert (spread["min"], spread["max"]) == (lengths.min(), lengths.max())
    assert spread["mean"] == pytest.approx(lengths.mean(), abs=0.005)
    for row in context_lengths(histogram):
        length = row["seq_length"]
        assert row["longer"] == pytest.approx((lengths > length).mean(), abs=1e-6)
        assert row["lost"] == pytest.approx(np.maximum(lengths - length, 0).sum() / lengths.sum(), abs=1e-6)
        assert 0.9 < row["fill"] <= 1
    assert percentiles({}) == {}


def test_lengths_of_millions_are_readable() -> None:
    """Context lengths to the longest; axes end with it, inside the picture; numbers with all their digits."""
    account, lengths = Account(), {"300": 20, "972400": 1, "1945853": 1}
    statistics = Statistics(turns={"2": 21, "3": 1}, **dict.fromkeys(LENGTHS, lengths))
    validation = Validation(account, statistics, {})
    assert [row["seq_length"] for row in context_lengths(lengths)][4:] == [8192, 32768, 131072, 524288, 2097152]
    assert context_lengths(lengths)[-1]["longer"] == context_lengths(lengths)[-1]["lost"] == 0
    table = [line for line in validation_lines(validation) if line.startswith("seq_length")]
    assert len({line.index(":") for line in table}) == 1
    html = render_report(validation)
    assert "e+" not in html.split("<body>")[1]
    assert f'<td class="n">{(20 * 300 + 972400 + 1945853) / 22:,.0f}</td>' in html
    ends = re.findall(r'<text x="430" y="162" text-anchor="(\w+)">([\d,]+)</text>', html)
    assert ends == [("end", "1,945,853")] * 3
    for axis in html.split("<svg")[1:]:
        shown = re.findall(r'y="162"[^>]*>([\d,]+)<', axis)
        assert len(shown) == len(set(shown))


def test_names_that_the_data_gives_are_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key and a language of any length: neither the account nor the report grows with them."""
    odd = {"k" * 9000: "v" * 9000, "k" * 9001: 1, "lang": "l" * 9000, **chat("q", "a")}
    path = write_jsonl(tmp_path / "in.jsonl", [odd, odd])
    assert validate_files(str(path), create_report=True) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 250
    assert len((tmp_path / "in.jsonl.report.html").read_text()) < 20_000
    assert validate_files(str(path), json=True) == 0
    figures = orjson.loads(capsys.readouterr().out)
    assert figures["account"]["fields"]["unknown"] == {"k" * 79 + "…": 4}
    assert figures["languages"] == {"l" * 79 + "…": 2}


def test_a_file_without_a_usable_line_exits_1_and_still_reports(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [b"x", b"y"])
    assert validate_files(str(path), create_report=True) == 1
    assert "broken JSON" in (tmp_path / "bad.jsonl.report.html").read_text()


def test_fix_writes_the_sound_and_keeps_the_rest_word_for_word(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "fixed.jsonl"
    assert write_fixed([str(path)], out)[:2] == (8, 2)
    sound = [orjson.loads(line) for line in out.read_bytes().splitlines()]
    assert sound[0] == LINES[0]
    assert sound[5]["messages"][2] == {"role": "assistant", "content": "y"}
    assert sound[7] == chat("tu", "ja")
    rejected = [orjson.loads(line) for line in (tmp_path / "fixed.jsonl.rejected.jsonl").read_bytes().splitlines()]
    assert [(entry["source"], entry["reason"]) for entry in rejected] == [
        (f"{path}:8", "broken JSON"),
        (f"{path}:9", "no assistant turn"),
    ]
    assert rejected[0]["record"].strip() == "{oops"
    assert rejected[1]["record"] == LINES[8]
    with pytest.raises(UserError, match="one of the inputs"):
        write_fixed([str(path)], path)


def test_the_report_is_self_contained_and_escapes_what_people_typed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [chat("<script>alert(1)</script>", "<img src=x onerror=y>"), b"<b>bad"])
    html = render_report(validate([str(path)], TOKENIZER, workers=1))
    assert "&lt;script&gt;alert(1)" in html
    assert not re.search(r"<script|<img|<b>bad|@import|url\(|(?:src|href)=\"(?!data:,)", html)
    assert html.count("<svg") == 4
    assert html.count('<div class="turn supervised">') == 1
    assert html.count('<div class="turn masked">') == 1


def test_tools_calls_reasoning_and_results_are_shown(tmp_path: Path) -> None:
    call = {"name": "look<up>", "arguments": {"of": "x & y"}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "reasoning": "I <b>must</b> look.", "tool_calls": [call]},
        {"role": "tool", "content": {"found": 1}, "name": "look<up>"},
        {"role": "assistant", "content": "It is 1.", "weight": 0},
    ]
    path = write_jsonl(
        tmp_path / "in.jsonl", [{"messages": turns, "tools": [{"name": "look<up>", "description": "<i>"}]}]
    )
    validation = validate([str(path)], AGENT_TOKENIZER, workers=1)
    html = render_report(validation)
    for shown in (
        "<b>tools</b> {&quot;type&quot;: &quot;function&quot;, &quot;function&quot;: {&quot;name&quot;: &quot;look",
        "<b>assistant, reasoning</b> I &lt;b&gt;must&lt;/b&gt; look.",
        "<b>assistant, tool call</b> look&lt;up&gt; {&quot;of&quot;: &quot;x &amp; y&quot;}",
        "<b>tool look&lt;up&gt;</b> {&quot;found&quot;: 1}",
    ):
        assert shown in html
    assert html.count('<div class="turn supervised">') == 2  # reasoning and call; the last answer has weight 0
    assert html.count('<div class="turn masked">') == 4
    assert validation.statistics.roles == {"user": 1, "assistant": 2, "tool": 1}
    assert validation.statistics.findings == {}


def test_a_sample_is_inspected_with_its_calls(tmp_path: Path) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "thinking": "hm", "tool_calls": [call]},
    ]
    path = write_jsonl(tmp_path / "in.jsonl", [{"messages": turns, "tools": [{"name": "add"}]}])
    dataset = prepare([path], Settings(seq_length=256), AGENT_TOKENIZER)
    description = describe_sample(dataset, 0, AGENT_TOKENIZER)
    text = "\n".join(line.plain for line in render_sample(description, AGENT_TOKENIZER, table=False))
    assert '«<|reasoning|>hm<|reasoning_end|><|tool_call|>{"name": "add", "arguments": {"a": 1}}' in text
    assert '{"type": "function", "function": {"name": "add"}}' in text.split("«")[0]


def test_bad_lines_by_what_exactly_is_wrong(tmp_path: Path) -> None:
    """By sub-reason with an example each, across workers' parts; their share is the headline."""
    turn = lambda role, content: {"role": role, "content": content}
    lines: list[Any] = [chat("hello", f"answer {n}") for n in range(90)]
    lines += [{"messages": [turn("user", "q"), turn("assistant", 5)]} for _ in range(3)]
    lines += [{"messages": [turn("user", "q"), turn("assistant", "a"), turn(7, "x")]} for _ in range(4)]
    lines += [{"messages": [turn("user", "q"), turn(f"robot{n}", "a")]} for n in range(2)]
    lines += [b"{oops", b""]
    path = write_jsonl(tmp_path / "in.jsonl", lines)
    validation = validate([str(path)], TOKENIZER, workers=2)
    wrong = validation.account.faults["wrong type"].subreasons
    assert {name: (kind.lines, kind.first) for name, kind in wrong.items()} == {
        "message …: `content` is a number": (3, f"{path}:91"),
        "message …: `role` is a number": (4, f"{path}:94"),
    }
    assert validation.account.faults["unknown role"].subreasons.keys() == {"message …: role …"}
    assert Account.from_dict(orjson.loads(orjson.dumps(validation.account.to_dict()))) == validation.account
    html = render_report(validation)
    assert "10 of 100 lines (10.0 %) are bad and left out; most often: wrong type." in html
    assert "<b>10 (10.0 %)</b><span>bad lines</span>" in html
    table = html.split("<h2>Bad lines: 10 of 100, 10.0 %</h2>")[1].split("</table>")[0]
    assert '<th class="n">of all</th>' in table  # shares stand under each other as the numbers do
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert [row[:4] for row in rows[:2]] == [
        ["wrong type", "message …: `role` is a number", "4", "4 %"],
        ["wrong type", "message …: `content` is a number", "3", "3 %"],
    ]
    assert [row[5] for row in rows if row[0] == "unknown role"] == ["message 2: role &#x27;robot0&#x27;"]
    assert "    message …: `role` is a number: 4" in "\n".join(validation.account.details())


def test_sub_reasons_are_bounded() -> None:
    account = Account()
    for number in range(40):
        account.fault("strange", number, detail=f"column {'abcdefghijklmnopqrstuvwxyzabcdefghijklmnop'[:number]}")
    kinds = account.faults["strange"].subreasons
    assert len(kinds) == MOST_SUBREASONS + 1
    assert sum(kind.lines for kind in kinds.values()) == 40


@settings(max_examples=200)
@given(st.integers(1, 10**7).flatmap(lambda whole: st.tuples(st.integers(0, whole), st.just(whole))))
def test_a_share_is_nothing_or_all_only_where_it_is(counts: tuple[int, int]) -> None:
    part, whole = counts
    shown = share(part, whole)
    assert (shown == "0 %") == (part == 0)
    assert (shown in ("100 %", "100.0 %")) == (part == whole)
    if not shown.startswith(("under", "over")):
        assert float(shown.removesuffix(" %")) == pytest.approx(100 * part / whole, rel=0.06, abs=0.06)


_TABLES = """
const out = document.createElement("pre");
out.id = "found";
const wide = [...document.querySelectorAll(".scroll")].filter((box) => box.scrollWidth > box.clientWidth + 1);
const shades = wide.map((box) => getComputedStyle(box).backgroundAttachment);
wide.forEach((box) => { box.scrollLeft = 1e6; });
out.textContent = JSON.stringify({
  wide: wide.length, shades, moved: wide.every((box) => box.scrollLeft > 0),
  reached: wide.every((box) => box.tabIndex === 0),
  page: document.documentElement.scrollWidth <= innerWidth,
});
document.body.append(out);
"""


@needs_browser
def test_wide_tables_scroll_visibly_on_a_phone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", LINES * 20)
    html = render_report(validate([str(path)], TOKENIZER, workers=1))
    document, messages = document_after(tmp_path / "phone", html, _TABLES, 390)
    assert messages == []
    found = orjson.loads(document.split('<pre id="found">')[1].split("</pre>")[0])
    assert found["wide"] >= 2
    assert set(found["shades"]) == {"local, local, scroll, scroll"}  # shades at the sides where more is
    assert found["moved"]
    assert found["reached"], "not by the keyboard"
    assert found["page"], "the page itself is wider than the screen"


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False), (390, True)])
def test_the_report_in_a_browser(tmp_path: Path, width: int, dark: bool) -> None:
    """No console message, no request, and pixels of the bars' colour in the picture."""
    from PIL import Image

    path = write_jsonl(tmp_path / "in.jsonl", LINES * 20)
    html = render_report(validate([str(path)], TOKENIZER, workers=1))
    picture, messages, requests = browse(tmp_path / "report", html, width, dark)
    assert messages == []
    assert requests == []
    image = Image.open(picture).convert("RGB")
    colours = {colour: count for count, colour in image.getcolors(1 << 24)}
    bar, background = ((0x6E, 0xA8, 0xE6), (0x16, 0x18, 0x1B)) if dark else ((0x2F, 0x6D, 0xB3), (0xFB, 0xFB, 0xF9))
    assert colours.get(bar, 0) > 500, "no bars to be seen"
    assert colours.get(background, 0) > 10_000
    # The same look at a page that does misbehave, so that silence means something.
    spoilt = html.replace("</body>", '<img src="http://127.0.0.1:9/x.png"><script>console.log("x")</script></body>')
    _, messages, requests = browse(tmp_path / "spoilt", spoilt, width, dark)
    assert len(messages) == 1
    assert requests == ["http://127.0.0.1:9/x.png"]
