"""What an image of each test-time method takes: the passes that comparisons state."""

from __future__ import annotations

from train.generation.options import Options
from train.methods.passes import Passes


def image_passes(options: Options, steps: int, cfg: bool) -> Passes:
    """Returns the passes of the backbone for one image that is kept; the most of DyMO's, which vary.

    Args:
        options: the method with its settings.
        steps: of the sampler.
        cfg: whether a guided sample is two passes.
    """
    samples = 1 + cfg
    match options.test_time:
        case "best-of-N" | "epsilon-greedy" | "zero-order":
            return Passes(samples * steps * options.search.candidates, 0)
        case "guidance":
            guided = sum(options.guidance.start <= n / steps <= options.guidance.end for n in range(steps))
            through = options.guidance.gradient == "through-model"
            return Passes(samples * steps, samples * guided * through)
        case "das":
            both = samples * steps * options.das.particles
            return Passes(both, both)
        case "freedom":
            plan = options.freedom.plan(steps)
            taken = 1 + sum(times for times, _ in plan)
            return Passes(samples * taken, samples * sum(times for times, guided in plan if guided))
        case "dymo":
            moved = options.dymo.moved_steps(steps)
            taken = moved * (1 + options.dymo.most_repeats)
            return Passes(samples * (steps - moved + taken), samples * taken)
        case "epsilon-greedy-steps":
            own = options.step_search
            return Passes(samples * (1 + (steps - 1) * (1 + own.rounds * own.candidates)), 0)
        case "none":
            return Passes(samples * steps, 0)
