"""The trainer's configuration: dataclass defaults < recipe TOML < command line."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from hyperalign.errors import HyperAlignError
from hyperalign.hypernetwork import HyperNetworkConfig
from hyperalign.schedule import Schedule, Variant
from hyperalign.targets import PerceptionMode

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The base model and where the hypernetwork looks."""

    base: Literal["tiny"] = "tiny"
    """Base model to align."""
    mode: PerceptionMode = "prefix"
    """prefix: middle and up blocks are adapted and perception is free; separate: all of them (the paper)."""
    variant: Variant = "S"
    """S: weights at every evaluation, P: at key times, I: once."""
    key_times: tuple[float, ...] = ()
    """Key times of P, falling fractions of the noise range; empty finds them on the base model first."""
    key_count: int = 2
    """How many key times to find for P, besides the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """L = reward_weight * L_R + preference_weight * L_G (Eq 10)."""

    reward_weight: float = 1.0
    """Weight of the reward loss; 0 trains on preferred pictures alone."""
    preference_weight: float = 1.0
    """Weight of the denoising loss on preferred pictures; 0 invites reward hacking."""
    reward_cap: float = float("inf")
    """Scores above this earn nothing more: relu(cap - score)."""
    prompts: int = 16
    """Prompts in each rollout."""
    timesteps: int = 2
    """Steps of each rollout that get a gradient."""
    rollout_steps: int = 10
    """Steps of the training sampler."""
    skip_first: int = 1
    """First steps of a rollout that get no reward gradient: x0-hat is a blur there."""
    guidance: float = 4.0
    """Classifier-free guidance of rollout and x0-hat; train at what you sample with."""
    preferred: int = 48
    """Preferred pictures in each step."""
    preferred_range: tuple[float, float] = (0.0, 1.0)
    """Times u of the noise on preferred pictures; high ones decide what is drawn, low ones how finely."""
    snr_cap: float = float("inf")
    """Min-SNR weighting of the preference loss (Hang et al. 2023); inf is Eq 9 as it stands."""
    drop_caption: float = 0.1
    """Share of preferred pictures shown without their caption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW with warm-up and a cosine to zero."""

    lr: float = 3e-4
    steps: int = 300
    warmup: int = 20
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.98
    """Decay of the average that is saved and shown."""
    bf16: bool = True
    """Run the frozen models in bfloat16 autocast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """EmojiScenes, drawn anew from its seed."""

    scenes: int = 12000
    """Preferred scenes (right captions, Fluent style) to encode once."""
    seed: int = 101
    cache: Path = Path("build/tiny")
    """Where fetched art and encoded scenes are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Held-out figures and pictures during training."""

    every: int = 50
    """Steps between evaluations; 0 turns them off."""
    prompts: int = 36
    """Held-out prompts of each evaluation, six families in turn."""
    steps: int = 15
    """Sampling steps of each evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Where things go."""

    out: Path = Path("runs/hyperalign")
    """Folder of log, state, grids and the finished hypernetwork."""
    seed: int = 0
    save_every: int = 25
    """Steps between saved states."""
    threads: int = 0
    """CPU threads; 0 leaves it to PyTorch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    network: HyperNetworkConfig = field(default_factory=HyperNetworkConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """Checks ranges. Raises HyperAlignError."""
        o, p = self.objective, self.optim
        _require(o.reward_weight >= 0, "objective.reward_weight", o.reward_weight, "0 or more")
        _require(o.preference_weight >= 0, "objective.preference_weight", o.preference_weight, "0 or more")
        _require(
            o.reward_weight + o.preference_weight > 0, "objective weights", "both 0", "at least one above 0"
        )
        _require(o.rollout_steps >= 2, "objective.rollout_steps", o.rollout_steps, "2 or more")
        room = o.rollout_steps - o.skip_first
        _require(
            0 <= o.skip_first < o.rollout_steps,
            "objective.skip_first",
            o.skip_first,
            "0 to rollout_steps - 1",
        )
        _require(1 <= o.timesteps <= room, "objective.timesteps", o.timesteps, f"1 to {room}")
        _require(o.prompts >= 1, "objective.prompts", o.prompts, "1 or more")
        _require(o.preferred >= 1, "objective.preferred", o.preferred, "1 or more")
        low, high = o.preferred_range
        _require(0 <= low < high <= 1, "objective.preferred_range", o.preferred_range, "0 <= low < high <= 1")
        _require(o.snr_cap > 0, "objective.snr_cap", o.snr_cap, "above 0")
        _require(0 <= o.drop_caption < 1, "objective.drop_caption", o.drop_caption, "0 up to 1")
        _require(o.guidance >= 1, "objective.guidance", o.guidance, "1 or more")
        _require(p.steps >= 1, "optim.steps", p.steps, "1 or more")
        _require(p.lr > 0, "optim.lr", p.lr, "above 0")
        _require(p.clip > 0, "optim.clip", p.clip, "above 0")
        _require(0 <= p.ema < 1, "optim.ema", p.ema, "0 up to 1")
        _require(
            self.data.scenes >= o.preferred, "data.scenes", self.data.scenes, "objective.preferred or more"
        )
        _require(self.run.save_every >= 1, "run.save_every", self.run.save_every, "1 or more")
        if self.model.key_times or self.model.variant != "P":
            self.schedule()

    def schedule(self) -> Schedule:
        """Returns the schedule. Raises HyperAlignError if key times are wrong."""
        return Schedule(self.model.variant, self.model.key_times)


def _require(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise HyperAlignError(
            f"{name} is {found}; expected {expected}. Change it in the recipe or on the command line."
        )


def load_recipe(path: Path) -> TrainConfig:
    """Returns the configuration of a recipe file.

    Raises:
        HyperAlignError: no such file, not TOML, an unknown key, a wrong type or a value out of range.
    """
    if not path.is_file():
        raise HyperAlignError(f"There is no recipe {path}. The shipped ones are in train/recipes.")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise HyperAlignError(f"The recipe {path} is not valid TOML: {error}. Correct that line.") from error
    return cast(TrainConfig, _from_table(TrainConfig, raw, path.name))


def _from_table(kind: type[Any], table: dict[str, Any], where: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind)}
    defaults = kind()
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise HyperAlignError(
                f"{where} has the unknown key {key!r}. {hint}Known keys: {', '.join(known)}."
            )
        values[key] = _coerce(getattr(defaults, key), value, f"{where}: {key}")
    return kind(**values)


def _coerce(default: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(default):
        if not isinstance(value, dict):
            raise HyperAlignError(f"{where} is {value!r}; expected a table such as [{where.split()[-1]}].")
        return _from_table(type(default), cast("dict[str, Any]", value), where)
    if isinstance(default, Path) and isinstance(value, str):
        return Path(value)
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(cast("list[Any]", value))
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise HyperAlignError(f"{where} is {value!r}; expected a {type(default).__name__}.")
    return value


def as_table(config: object) -> dict[str, Any]:
    """Returns the configuration as JSON and TOML types."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return value.as_posix()
        if isinstance(value, tuple):
            return list(cast("tuple[Any, ...]", value))
        return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value

    return {key: plain(value) for key, value in dataclasses.asdict(cast(Any, config)).items()}
