"""The demo: the same prompts drawn by the base model and by HyperAlign I, P and S in a real ComfyUI.

`python3 scripts/demo.py` sets up what is missing, starts ComfyUI, runs the shipped workflow for every
prompt, seed and method, and writes demo_output/grid.png, the single images and report.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: see "nodes" in CONTRIBUTING.md

from scripts.common import ROOT, ScriptError, say
from scripts.environment import enter_environment
from scripts.host import Server, exit_on_termination

OUTPUT = ROOT / "demo_output"
MOST_PER_FAMILY = 10


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--port", type=int, help="wanted port of ComfyUI; another is chosen if it is taken")
    parser.add_argument("--per-family", type=int, default=2, help="prompts per GenEval family (default: 2)")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="where the results go (default: demo_output)"
    )
    arguments = parser.parse_args()
    if not 1 <= arguments.per_family <= MOST_PER_FAMILY:
        parser.error(f"--per-family is {arguments.per_family}; it must be 1 to {MOST_PER_FAMILY}")
    return arguments


def run(tree: Path, arguments: argparse.Namespace) -> None:
    """Draws, judges and reports.

    Raises:
        ScriptError: a step failed; the message says which, and what to do.
    """
    # Only inside the environment is there what these modules import.
    from hyperalign.cli.sample.client import ComfyClient
    from hyperalign.errors import HyperAlignError
    from scripts.drawing import choose_prompts, draw_all
    from scripts.grid import save_grid
    from scripts.measure import measure, print_table, write_report

    say(f"Starting ComfyUI from {tree} ...")
    with Server(tree, "demo", arguments.port) as server:
        say(f"ComfyUI answers at {server.url}.")
        try:
            requests = choose_prompts(arguments.per_family)
            drawing = draw_all(server, ComfyClient(server.url), requests, arguments.output)
        except HyperAlignError as error:
            server.check_alive()
            raise ScriptError(f"ComfyUI could not run the workflow: {error}") from error
    try:
        scored = measure(drawing.images)
    except HyperAlignError as error:
        raise ScriptError(f"The images could not be judged: {error}") from error
    report = write_report(drawing, scored, arguments.output / "report.json")
    save_grid(scored, arguments.output / "grid.png")
    print_table(report)
    say(f"Look at {arguments.output / 'grid.png'}; the figures are in {arguments.output / 'report.json'}.")


def main() -> int:
    """Runs the demo; returns the process's exit status."""
    exit_on_termination()
    try:
        arguments = parse_arguments()
        run(enter_environment(Path(__file__).resolve()), arguments)
    except (ScriptError, OSError) as error:
        say(f"Error: {error}")
        return 1
    except KeyboardInterrupt:
        say("Stopped; nothing is left running.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
