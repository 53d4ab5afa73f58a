"""The set-up scripts' decisions, without installing or starting anything."""

import socket
from pathlib import Path

import pytest

from hyperalign.cli.sample.server import ADDRESS, free_port
from scripts import environment, host, host_tree
from scripts.common import ScriptError


def test_a_taken_port_is_replaced():
    with socket.socket() as taken:
        taken.bind((ADDRESS, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) not in (0, port)


def test_a_free_port_is_kept():
    port = free_port()
    assert free_port(port) == port


def test_comfyui_path_must_be_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(ScriptError, match=r"COMFYUI_PATH is .* has no main.py, no comfyui_version.py"):
        host_tree.comfyui_tree(tmp_path)


def test_comfyui_path_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for mark in host_tree.MARKS:
        (tmp_path / mark).touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert host_tree.comfyui_tree(tmp_path) == tmp_path.resolve()


def test_a_full_disk_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 1e9}))
    with pytest.raises(ScriptError, match=r"1\.0 GB of free disk; the environment needs 6 GB"):
        environment._check_disk()


def test_an_old_python_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment.sys, "version_info", (3, 9, 1))
    with pytest.raises(ScriptError, match=r"needs 3\.10 or newer"):
        environment._check_python()


def test_host_requirements_leave_torch_to_us(tmp_path: Path):
    lines = ["torch", "torchvision", "numpy>=1.25.0", "", "#notes", "spandrel", "pydantic~=2.0 # why"]
    (tmp_path / "requirements.txt").write_text("\n".join(lines))
    assert environment._host_requirements(tmp_path) == (["numpy>=1.25.0", "pydantic~=2.0"], ["spandrel"])


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What pip was asked for by an environment in which torchaudio's compiled operators cannot load."""
    asked: list[str] = []
    operators = tmp_path / "site-packages" / "torchaudio" / "lib" / "_torchaudio.abi3.so"

    def run_pip(_python: Path, arguments: list[str], _purpose: str) -> None:
        asked.extend(arguments)
        if environment.TORCHAUDIO in arguments:
            operators.parent.mkdir(parents=True)
            operators.touch()

    def imports(_python: Path, statement: str) -> bool:
        there = environment.TORCHAUDIO in asked and not operators.exists()
        return there if statement == "torchaudio" else True

    monkeypatch.setattr(environment, "run_pip", run_pip)
    monkeypatch.setattr(environment, "_imports", imports)
    monkeypatch.setattr(environment, "_site_packages", lambda _python: tmp_path / "site-packages")
    return asked


def test_a_checkout_gets_torchaudio_without_operators_that_cannot_load(installed: list[str], tmp_path: Path):
    """ComfyUI 0.20 and newer import it when they start."""
    (tmp_path / "requirements.txt").write_text("torch\ntorchaudio\n")
    environment._install(tmp_path)
    assert environment.TORCHAUDIO in installed
    assert environment._imports(tmp_path, "torchaudio")


def test_the_fetched_host_starts_without_torchaudio(
    installed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "requirements.txt").write_text("torch\ntorchaudio\n")
    monkeypatch.setattr(environment, "FETCHED_TREE", tmp_path)
    environment._install(tmp_path)
    assert environment.TORCH in installed
    assert environment.TORCHAUDIO not in installed


def test_the_installed_pack_is_clean(tmp_path: Path):
    pack = host.install_pack(tmp_path)
    names = {path.name for path in pack.iterdir()}
    assert {"__init__.py", "hyperalign", "nodes", "pyproject.toml"} <= names
    assert not names & {".git", ".venv", "build", "demo_output", "tests"}
    assert not list(pack.rglob("__pycache__"))
