"""The environment check: every line has a level and a remedy, a broken check is a finding, the exit code follows."""

import json
from collections.abc import Iterator

import pytest

from lumina.cli import main
from lumina.plan import environment
from lumina.plan.environment import CheckResult, check_all


def test_here_and_now() -> None:
    findings = check_all()
    assert {finding.level for finding in findings} <= {"OK", "WARN", "FAIL"}
    assert [f for f in findings if f.level == "FAIL"] == []
    assert all(finding.remedy for finding in findings if finding.level != "OK")
    names = {finding.name for finding in findings}
    assert {"python", "torch", "deepspeed", "compiler", "memory", "disk", "shared memory", "tokenizer", "gloo"} <= names


def test_a_check_that_breaks_is_a_failure() -> None:
    def check_broken_thing() -> Iterator[CheckResult]:
        yield CheckResult("OK", "first", "fine")
        raise RuntimeError("driver on fire")

    first, second = check_all((check_broken_thing,))
    assert first.level == "OK"
    assert (second.level, second.name) == ("FAIL", "broken thing")
    assert "driver on fire" in second.detail


@pytest.mark.parametrize(
    ("name", "value", "check", "level"),
    [
        ("MIN_PYTHON", (99, 0), "check_python", "FAIL"),
        ("MIN_MEMORY", 2**60, "check_memory", "WARN"),
        ("MIN_FREE_DISK", 2**60, "check_disk", "WARN"),
        ("MIN_SHM", 2**60, "check_shared_memory", "WARN"),
        ("REQUIRED", ("no-such-distribution",), "check_packages", "FAIL"),
    ],
)
def test_what_is_missing_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object, check: str, level: str
) -> None:
    monkeypatch.setattr(environment, name, value)
    finding = next(getattr(environment, check)())
    assert finding.level == level
    assert finding.remedy


def test_no_compiler_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert next(environment.check_compilers()).level == "FAIL"


@pytest.mark.parametrize(("level", "code"), [("OK", 0), ("WARN", 0), ("FAIL", 1)])
def test_exit_code_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: environment.Status, code: int
) -> None:
    def check() -> Iterator[CheckResult]:
        print("noise from a library")
        yield CheckResult(level, "thing", "as it is", "do this")

    monkeypatch.setattr(environment.check_all, "__defaults__", ((check,),))
    assert main(["check-environment", "--json"]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is (code == 0)
    assert answer["findings"] == [{"level": level, "name": "thing", "detail": "as it is", "remedy": "do this"}]
    assert main(["check-environment"]) == code
    assert f"{level:4}  thing" in capsys.readouterr().out
