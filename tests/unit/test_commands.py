"""The command line as a whole: its commands, and the exit status after an error, Ctrl-C and a signal."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli
from PIL import Image

from hyperalign.cli import main as commands
from hyperalign.cli.study import command as study
from hyperalign.errors import HyperAlignError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_has_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        commands.main([name, "--help"])
    assert f"usage: python -m hyperalign {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in commands.COMMANDS if name != "sample"])
@pytest.mark.parametrize(
    ("raised", "status"),
    [(HyperAlignError("found a, expected b. Do c."), 2), (KeyboardInterrupt(), 130)],
    ids=["error", "ctrl-c"],
)
def test_errors_and_ctrl_c_become_a_line_and_a_status(
    name: str, raised: BaseException, status: int,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(arguments: object) -> int:
        raise raised

    command = commands.COMMANDS[name]
    monkeypatch.setattr(importlib.import_module(f"hyperalign.cli.{command.module}"), "main", fail)
    assert commands.main([name]) == status
    expected = command.interrupted if status == 130 else f"error: {raised}"
    assert capsys.readouterr().err.strip() == expected


def test_other_exceptions_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "main", lambda arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        commands.main(["study"])


def test_an_unknown_command_is_refused_and_the_known_ones_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["draw"]) == 2
    error = capsys.readouterr().err
    assert "found the command 'draw', expected one of sample, score" in error
    assert commands.main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"python -m hyperalign {name}" in listed for name in commands.COMMANDS)


def test_the_console_script_is_the_same_command_line() -> None:
    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["hyperalign"].partition(":")
    assert getattr(importlib.import_module(module), name) is commands.main


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_running_command_and_keeps_its_scores(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    for index in range(400):
        Image.new("RGB", (64, 64), (index % 256, 0, 0)).save(tmp_path / f"{index}.png")
    command = ["score", str(tmp_path), "--reward", "tiny reward", "--prompt", "a red circle", "--batch", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hyperalign", *command, "--device", "cpu"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / ".scores.csv.log.jsonl"
    until = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 3) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == status
    assert "Traceback" not in error
    assert number != signal.SIGINT or error.strip().endswith("The same command resumes from them.")
    assert len(log.read_text().splitlines()) > 3
    assert not (tmp_path / "scores.csv").exists()
