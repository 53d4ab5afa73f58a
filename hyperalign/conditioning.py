"""How much a hypernetwork's weights depend on prompt and time, and what that is worth, as its file states it.

Both are measured in training and stored in the header's `training` under `conditioning`: `shares` divides
the energy of the generated weights (`trace_energy`), `gain` says what images lose when the weights are
averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

from .finite import is_finite
from .trace_energy import PARTS

Change = Literal["averaged", "averaged over prompts", "averaged over times", "of another prompt"]
CHANGES: tuple[Change, ...] = get_args(Change)
LEAST_SHARE = 0.01
"""Weights of which less depends on the prompt are a static LoRA's for all practical purposes."""
NAMES = {"geneval": "GenEval", "validation_reward": "validation reward"}


def sentences(training: Mapping[str, Any]) -> list[str]:
    """Returns what a header's `training` says of the conditioning; nothing if it is not measured."""
    found = _table(training.get("conditioning"))
    lines: list[str] = []
    shares = _numbers(found.get("shares"))
    if set(PARTS) <= shares.keys():
        lines.append(share_sentence(shares))
    for change, text in (
        ("averaged", "averaged into one LoRA for all prompts and times"),
        ("of another prompt", "exchanged for those of another prompt"),
    ):
        gains = _table(_table(found.get("gain")).get(change))
        parts = [_loss(name, _numbers(value)) for name, value in gains.items()]
        if parts := [part for part in parts if part]:
            lines.append(f"With its weights {text}: {', '.join(parts)}.")
    return lines


def share_sentence(shares: Mapping[str, float]) -> str:
    """Returns the shares of PARTS in words."""
    by_prompt, by_time, both, same = (
        percent(shares[part]) for part in ("prompt", "time", "interaction", "same")
    )
    return (
        f"{by_prompt} of these weights depend on the prompt, {by_time} on time, {both} on both together; "
        f"{same} are the same for all."
    )


def warning(shares: Mapping[str, float]) -> str:
    """Returns a sentence about weights that hardly depend on the prompt, nothing about others."""
    if shares.get("prompt", 1.0) >= LEAST_SHARE:
        return ""
    return (
        f"Only {percent(shares['prompt'])} of the generated weights depend on the prompt: what was learned "
        "is nearly a static LoRA, which `--network.conditioning none` trains directly and "
        "`python -m hyperalign export` writes for any program."
    )


def percent(share: float) -> str:
    """Returns a share with as many digits as it takes to tell it from 0 and 100 %."""
    value = 100.0 * share
    if 1.0 <= value <= 99.0 or value in (0.0, 100.0):
        return f"{value:.0f} %"
    digits = 1 if 0.1 <= value <= 99.9 else 2
    return f"{value:.{digits}f} %"


def _loss(metric: str, value: Mapping[str, float]) -> str:
    if "gain" not in value:
        return ""
    ends = [value[name] for name in ("high", "low") if name in value]
    loss, *interval = (f"{0.0 - number:+.3g}" for number in (value["gain"], *ends))  # 0 - 0 has no minus sign
    return f"{NAMES.get(metric, metric)} {loss} [{', '.join(interval) or 'too few prompts for an interval'}]"


def _table(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _numbers(value: Any) -> dict[str, float]:
    """Returns the finite numbers of a table that a file states, whatever else it holds."""
    return {name: float(number) for name, number in _table(value).items() if is_finite(number)}
