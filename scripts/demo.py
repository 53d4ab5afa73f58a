"""The demo: the base model and HyperAlign I, P and S generate images of the same prompts in a real ComfyUI.

`python3 scripts/demo.py` sets up what is missing, starts ComfyUI, runs the shipped workflow for every
prompt, seed and method, and writes demo_output/grid.png, the single images and report.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: see "nodes" in CONTRIBUTING.md

from hyperalign.errors import HyperAlignError
from hyperalign.openmp import wait_passively
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
    """Generates images, scores them and reports.

    Raises:
        ScriptError: a step failed; the message says which, and what to do.
    """
    # What these modules import is only installed inside the environment.
    from hyperalign.cli.sample.client import ComfyClient
    from scripts.generation import choose_prompts, generate_all
    from scripts.grid import save_grid
    from scripts.measure import measure, print_table, write_report

    say(f"Starting ComfyUI from {tree} ...")
    with Server(tree, "demo", arguments.port) as server:
        say(f"ComfyUI answers at {server.url}.")
        try:
            requests = choose_prompts(arguments.per_family)
            demo = generate_all(server, ComfyClient(server.url), requests, arguments.output)
        except HyperAlignError as error:
            server.check_alive()
            raise ScriptError(f"ComfyUI could not run the workflow: {error}") from error
    try:
        scored = measure(demo.images)
    except HyperAlignError as error:
        raise ScriptError(f"The images could not be scored: {error}") from error
    report = write_report(demo, scored, arguments.output / "report.json")
    save_grid(scored, arguments.output / "grid.png")
    print_table(report)
    say(f"Look at {arguments.output / 'grid.png'}; the metrics are in {arguments.output / 'report.json'}.")


def main() -> int:
    """Runs the demo; returns the process's exit status."""
    exit_on_termination()
    wait_passively()  # before torch is imported
    try:
        arguments = parse_arguments()
        run(enter_environment(Path(__file__).resolve()), arguments)
    except (ScriptError, HyperAlignError, OSError) as error:
        say(f"Error: {error}")
        return 1
    except KeyboardInterrupt:
        say("Stopped; nothing is left running.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
