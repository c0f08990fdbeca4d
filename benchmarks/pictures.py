"""The pictures in docs/, all made by one command from real runs, a real file and a real server.

    python benchmarks/pictures.py [--only run-report data-report chat-page live] [--model RUN] [--out docs]

run-report     three runs of the nano preset made narrow (64 x 2) on the dialogues of chitchat-dataset, with three
               learning rates: `lumina report` of the three, and of the second alone on a phone;
               or of --runs RUN …
data-report    `lumina validate-data --create-report` of chitchat-dataset's dialogues with 60 lines spoilt in six ways
chat-page      the page in front of the tests' model, which was taught two conversations by heart, one with tool calls
               (tests/infer/taught_models.py); with --model RUN of `lumina serve RUN`, asked what the quickstart asks
live           benchmarks/live_picture.py

Each page is taken on a wide light screen and on a dark phone of 390 pixels, by a headless Chromium. Nothing is changed
afterwards. Needs Chromium (Debian: apt-get install chromium), tmux for `live`, and what `make quickstart`
needs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.browser import CHROMIUM, Browser  # noqa: E402  # the tests' own browser, found from any folder

RATES = (3e-3, 1e-2, 3e-2)
NARROW = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "seq_length": 128, "num_workers": 1}
QUESTIONS = (  # the quickstart's, chosen before its model was trained
    "Hello there! How are you today?",
    "Can you tell me a joke, please?",
    "My computer does not turn on. What should I do?",
)
PHONE, DESK = (390, 844), (1100, 900)


def lumina(*words: str, folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "lumina", *words], check=True, cwd=folder, stdout=subprocess.DEVNULL)


def conversations(folder: Path) -> None:
    """data/chitchat.train.jsonl and, cut to an evaluation of seconds, data/chitchat.eval.jsonl in `folder`."""
    subprocess.run([sys.executable, "-m", "lumina.data.chitchat", "data"], check=True, cwd=folder)
    held_out = folder / "data" / "chitchat.eval.jsonl"
    held_out.write_text("".join(held_out.read_text().splitlines(keepends=True)[:24]))


def trained(folder: Path, steps: int) -> list[str]:
    """Three runs that differ in their learning rate."""
    conversations(folder)
    settings = {**NARROW, "eval_every_n_batches": 10, "layer_stats_every": 10, "system_metrics_seconds": 2}
    names = [f"lr-{rate:g}" for rate in RATES]
    for name, rate in zip(names, RATES, strict=True):
        line = ["--config", "nano", "--experiment-name", name, "--train-data", "data/chitchat.train.jsonl"]
        line += ["--eval-data", "data/chitchat.eval.jsonl", "--batch-size", "2", "--grad-accum", "1", "--lr", str(rate)]
        line += ["--max-steps", str(steps)]
        line += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        lumina("train", *line, folder=folder)
    return [str(folder / "experiments" / name) for name in names]


def run_report(browser: Browser, folder: Path, out: Path, arguments: argparse.Namespace) -> None:
    runs = [str(Path(run).resolve()) for run in arguments.runs or trained(folder, arguments.steps)]
    lumina("report", *runs, "--out", "compared.html", folder=folder)
    lumina("report", runs[len(runs) // 2], "--out", "alone.html", folder=folder)
    for page, name, size, dark in (
        ("compared", "run-report", DESK, False),
        ("alone", "run-report-phone-dark", PHONE, True),
    ):
        take(browser, folder / f"{page}.html", out / f"{name}.png", size, dark)


def spoil(source: Path, target: Path) -> None:
    """The conversations of a file with 60 lines among them that no run could use, as exports have them."""
    lines = source.read_text().splitlines()
    user = {"role": "user", "content": "Hello"}
    spoilt = [
        *(line[: len(line) // 2] for line in lines[:22]),  # cut off by a full disk
        *(json.dumps({"messages": [user, {"role": "assistant", "content": 5}]}) for _ in range(14)),
        *(json.dumps({"messages": [user, {"role": 3, "content": "Hi"}]}) for _ in range(6)),
        *(json.dumps({"messages": [user, {"role": "robot", "content": "Hi"}]}) for _ in range(9)),
        *(json.dumps({"messages": [user]}) for _ in range(5)),
        *(json.dumps({"messages": []}) for _ in range(4)),
    ]
    every = len(lines) // len(spoilt)
    with target.open("w") as file:
        for number, line in enumerate(lines):
            file.write(line + "\n")
            if number % every == 0 and spoilt:
                file.write(spoilt.pop(0) + "\n")


def data_report(browser: Browser, folder: Path, out: Path, arguments: argparse.Namespace) -> None:
    conversations(folder)
    spoil(folder / "data" / "chitchat.train.jsonl", folder / "chats.jsonl")
    lumina("validate-data", "chats.jsonl", "--create-report", folder=folder)
    (report,) = folder.glob("*.html")
    take(browser, report, out / "data-report.png", DESK, False)
    take(browser, report, out / "data-report-phone-dark.png", PHONE, True)


def take(browser: Browser, page: Path, picture: Path, size: tuple[int, int], dark: bool) -> None:
    browser.open(page.as_uri(), *size, dark, phone=size is PHONE)
    time.sleep(1.0)  # the charts are drawn
    browser.picture(picture)
    print(picture)


def chat_page(browser: Browser, folder: Path, out: Path, arguments: argparse.Namespace) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if arguments.model is None:
        return taught_page(browser, folder, out)
    model = str(Path(arguments.model).resolve())
    command = [sys.executable, "-m", "lumina", "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, cwd=folder)
    address = f"http://127.0.0.1:{port}/"
    try:
        answers(address, server)
        for name, size, dark in (("light", DESK, False), ("phone-dark", PHONE, True)):
            talk(browser, address, size, dark)
            browser.picture(out / f"chat-page-{name}.png")
            browser.click("#open-settings")
            browser.picture(out / f"chat-settings-{name}.png")
            print(out / f"chat-page-{name}.png")
    finally:
        server.terminate()
        server.wait()


def taught_page(browser: Browser, folder: Path, out: Path) -> None:
    """A conversation in which the model calls a tool twice and is given the results."""
    from tests.infer.serve.running_server import running
    from tests.infer.taught_models import ANSWER, ASKED, CALLS, WEATHER, taught

    ended = "!document.querySelector('[aria-busy]')"
    with running(taught(folder / "taught")) as server:
        for name, size, dark in (("light", DESK, False), ("phone-dark", PHONE, True)):
            browser.open(server.address, *size, dark, phone=size is PHONE)
            browser.wait("document.getElementById('model').textContent !== ''")
            browser.click("#open-settings")
            browser.ask(f"document.getElementById('tools').value = JSON.stringify([{WEATHER}.function])")
            browser.ask("document.getElementById('temperature').value = 0")
            browser.picture(out / f"chat-settings-{name}.png")
            browser.press("Escape")
            browser.click("#input")
            browser.type(ASKED.content)
            browser.press("Enter")
            browser.wait(f"{ended} && document.querySelectorAll('.call').length === {len(CALLS)}")
            for result in ("rain", "sun"):
                browser.type(result)
                browser.press("Enter")
            browser.wait(f"{ended} && document.getElementById('log').textContent.includes({ANSWER!r})")
            browser.picture(out / f"chat-page-{name}.png")
            print(out / f"chat-page-{name}.png")


def answers(address: str, server: subprocess.Popen[bytes], seconds: float = 300.0) -> None:
    """Wait until the server is there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(address + "health", timeout=5).read()
        except OSError:
            time.sleep(0.5)
        else:
            return
    sys.exit("the server does not answer")


def talk(browser: Browser, address: str, size: tuple[int, int], dark: bool) -> None:
    browser.open(address, *size, dark, phone=size is PHONE)
    browser.wait("document.getElementById('model').textContent !== ''")
    browser.ask("document.getElementById('temperature').value = 0; document.getElementById('max_tokens').value = 60")
    for number, question in enumerate(QUESTIONS, 1):
        browser.type(question)
        browser.press("Enter")
        done = f"document.querySelectorAll('article').length === {2 * number} && !document.querySelector('[aria-busy]')"
        browser.wait(done, 120)


def live(browser: Browser, folder: Path, out: Path, arguments: argparse.Namespace) -> None:
    picture = str((out / "live.svg").resolve())
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "live_picture.py"), "--out", picture], check=True)


MADE: dict[str, Callable[[Browser, Path, Path, argparse.Namespace], None]] = {
    "run-report": run_report,
    "data-report": data_report,
    "chat-page": chat_page,
    "live": live,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MADE, default=list(MADE), help="these pictures")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="the folder for the pictures")
    parser.add_argument("--model", help="the run that talks on the chat page")
    parser.add_argument("--runs", nargs="+", help="runs for the run report, instead of three that are trained for it")
    parser.add_argument("--steps", type=int, default=60, help="of each run in the run report")
    arguments = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("Chromium is needed (Debian: apt-get install chromium)")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        scratch = Path(tempfile.mkdtemp())
        try:
            with Browser(scratch) as browser:
                MADE[name](browser, scratch, arguments.out, arguments)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
