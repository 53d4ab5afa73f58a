"""Chromium for the browser tests: found, or installed by apt where that may be done without asking.

Standard library only.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from scripts.common import TAIL_LINES, ScriptError, say

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge", "chrome")
MAC_CHROME = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
PACKAGES = ("chromium", "fonts-dejavu-core")  # without a font every letter is a box
APT_SECONDS = 600


def browser_is_required() -> bool:
    """Returns whether a missing browser is a failure: where CI is set, as `.ci/run` does."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def find_browser() -> Path | None:
    """Returns Chromium or a browser made of it, if there is one."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None and MAC_CHROME.is_file():
        return MAC_CHROME
    return Path(found) if found else None


def ensure_browser() -> Path:
    """Returns a browser, after installing Debian's Chromium if this may be done without asking.

    Raises:
        ScriptError: there is none; the message says why it was not installed, and how to install it.
    """
    browser = find_browser()
    if browser is None:
        _install_chromium()
        browser = find_browser()
    if browser is None:
        raise ScriptError(f"apt installed {PACKAGES[0]}, but none of {', '.join(NAMES)} is on PATH.")
    return browser


def _install_chromium() -> None:
    apt = [
        *_as_root(),
        "env",
        "DEBIAN_FRONTEND=noninteractive",
        "apt-get",
        "-q",
        "-o",
        "DPkg::Lock::Timeout=120",
    ]
    say(f"Installing {' and '.join(PACKAGES)} with apt ...")
    _run([*apt, "update"])
    _run([*apt, "install", "--yes", "--no-install-recommends", *PACKAGES])


def _as_root() -> list[str]:
    """Returns what stands before a command to run it as root, here on Debian.

    Raises:
        ScriptError: apt has no Chromium here, or this user may not install it.
    """
    by_hand = "install Chromium or Chrome by hand"
    if sys.platform != "linux" or shutil.which("apt-get") is None:
        raise ScriptError(f"There is no Chromium, and no apt to install it: {by_hand}.")
    system = _distribution()
    if system == "ubuntu":
        raise ScriptError(
            f"There is no Chromium, and Ubuntu's is a snap, which apt cannot install everywhere: {by_hand} "
            "(`sudo snap install chromium`, or Chrome's .deb)."
        )
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") and subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode == 0:
        return ["sudo", "-n"]
    raise ScriptError(
        "There is no Chromium, and this user may not install it: `sudo apt-get install chromium`."
    )


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["ID"]
    except OSError:  # no /etc/os-release
        return ""


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", timeout=APT_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ScriptError(f"`{' '.join(command)}` was not done after {APT_SECONDS} s.") from error
    if result.returncode != 0:
        tail = "\n".join(result.stdout.rstrip().splitlines()[-TAIL_LINES:])
        raise ScriptError(f"`{' '.join(command)}` failed; its last lines were:\n{tail}")
