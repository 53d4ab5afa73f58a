"""The options of train/generate.py: what is drawn, by which method, and where to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hyperalign.errors import HyperAlignError
from hyperalign.search import Plan
from train.config import TrainConfig
from train.models.load import base_of_folder
from train.recipe import load_recipe

TestTime = Literal[
    "none", "best-of-N", "epsilon-greedy", "zero-order", "epsilon-greedy-steps", "guidance", "das", "freedom",
    "dymo",
]  # fmt: skip
SEARCHES = ("best-of-N", "epsilon-greedy", "zero-order")
STEERED = ("das", "freedom", "dymo")
"""By a gradient through the model."""
SIDE = 512
"""Largest side, in pixels, at which predictions are decoded for a gradient."""
Precision = Literal["recipe", "bfloat16", "float32"]
Gradient = Literal["prediction", "through-model"]
Semantic = Literal["auto", "on", "off"]
RESOLUTIONS = {"sd15": 512}
"""Of base models that are given without a recipe; 1024 for the others."""
STEPS = 50
GUIDANCE_SCALES = {"flux": 3.5}
"""Of base models that are given without a recipe; 7.5 for the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """Search over the initial noise: best-of-N, epsilon-greedy and zero-order.

    The method that papers compare with as epsilon-greedy is epsilon-greedy-steps (--step-search).
    """

    candidates: int = 8
    """Images that are drawn for each image that is kept."""
    round_size: int = 4
    """epsilon-greedy, zero-order: candidates near one noise, before the search moves to the best."""
    radius: float = 0.5
    """epsilon-greedy, zero-order: distance of candidates, as a fraction of fresh noise."""
    epsilon: float = 0.4
    """epsilon-greedy: probability that a candidate is fresh."""

    def plan(self, mode: TestTime, seed: int, batch: int) -> Plan:
        """Returns the plan of one image's search. Raises HyperAlignError on a value out of range."""
        if mode not in SEARCHES:
            raise HyperAlignError(f"{mode} is no search; expected best-of-N, epsilon-greedy or zero-order.")
        return Plan(
            count=self.candidates, seed=seed, mode=mode, batch=batch, round_size=self.round_size,
            radius=self.radius, epsilon=self.epsilon,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSearchOptions:
    """epsilon-greedy-steps (arXiv 2506.03164): search over the noise of every step.

    With the defaults a step evaluates the model 81 times.
    """

    rounds: int = 20
    """How often the search of a step moves to the best candidate."""
    candidates: int = 4
    """Candidates of a round; --batch of them are evaluated at once."""
    epsilon: float = 0.4
    """Probability that a candidate is fresh; the others are near the best one of the round before."""
    radius: float = 0.15
    """Their greatest distance from it, as a fraction of fresh noise."""
    eta: float = 1.0
    """Noise of the steps; 1 is DDPM's."""
    keep_best: bool = False
    """Move only to candidates that are better than the best one so far; the authors forget that one."""
    rescale: bool = False
    """Give near candidates the variance of fresh noise, as ComfyUI's Best-of-N Sampler does; the authors'
    grows with every round."""

    def check(self) -> None:
        """Raises HyperAlignError on a value out of range."""
        require_option(self.rounds >= 1, "step_search.rounds", self.rounds, "1 or more")
        require_option(self.candidates >= 1, "step_search.candidates", self.candidates, "1 or more")
        require_option(0.0 <= self.epsilon <= 1.0, "step_search.epsilon", self.epsilon, "0 to 1")
        require_option(0.0 < self.radius < float("inf"), "step_search.radius", self.radius, "above 0")
        require_option(0.0 < self.eta <= 1.0, "step_search.eta", self.eta, "above 0, at most 1")

    def plan(self) -> Plan:
        """Returns the plan of one step's search."""
        return Plan(
            count=1, mode="epsilon-greedy-steps", round_size=self.candidates, iterations=self.rounds,
            radius=self.radius, epsilon=self.epsilon,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidanceOptions:
    """Gradient guidance by the rewards on the one-step prediction."""

    strength: float = 0.1
    """Size of a step, relative to the prediction."""
    start: float = 0.1
    """First guided step, as a fraction of all; x0-hat is a blur before."""
    end: float = 0.7
    """Last guided step."""
    gradient: Gradient = "prediction"
    """Where the gradient ends: at the one-step prediction (MPGD), or at the noisy image, through the model
    (FreeDoM, DyMO), which takes three to four times the work."""
    decode_size: int = 512
    """Largest side, in pixels, at which predictions are decoded."""

    def check(self) -> None:
        """Raises HyperAlignError on a value out of range."""
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise HyperAlignError(
                f"--guidance.start is {self.start} and --guidance.end {self.end}; expected "
                "0 <= start <= end <= 1. Use 0.1 and 0.7."
            )
        if self.decode_size < 64 or not 0.0 < self.strength < float("inf"):
            raise HyperAlignError(
                f"--guidance.strength is {self.strength} and --guidance.decode-size {self.decode_size}; "
                "expected a number above 0 and 64 or more. Use 0.1 and 512."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DasOptions:
    """DAS: particles that are weighted and resampled on their way."""

    particles: int = 4
    """Images that run together for each one that is kept."""
    alpha: float = 0.005
    """Temperature of the reward: samples follow exp(reward / alpha). This is the authors' for the aesthetic
    score; for a reward that is a plain cosine, as HPSv2 and CLIP here, theirs is 1e-4."""
    eta: float = 1.0
    """Noise of the steps."""

    def check(self) -> None:
        """Raises HyperAlignError on a value out of range."""
        require_option(self.particles >= 1, "das.particles", self.particles, "1 or more")
        require_option(self.alpha > 0.0, "das.alpha", self.alpha, "above 0")
        require_option(0.0 < self.eta <= 1.0, "das.eta", self.eta, "above 0, at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class FreedomOptions:
    """FreeDoM: steps in the middle of a run are moved along the gradient, and repeated."""

    strength: float = 0.2
    """Size of a step, relative to that of classifier-free guidance."""
    guided: tuple[float, float] = (0.3, 0.7)
    """Guided steps, as shares of the run that are left."""
    travelled: tuple[float, float] = (0.4, 0.7)
    """Those among them that are repeated."""
    travels: int = 3
    """How often each of these is taken."""
    eta: float = 1.0
    """Noise of the steps; 1 is DDPM's."""

    def check(self) -> None:
        """Raises HyperAlignError on a value out of range."""
        for name in ("guided", "travelled"):
            low, high = getattr(self, name)
            require_option(0.0 <= low <= high <= 1.0, f"freedom.{name}", (low, high), "0 <= low <= high <= 1")
        require_option(0.0 < self.strength < float("inf"), "freedom.strength", self.strength, "above 0")
        require_option(self.travels >= 1, "freedom.travels", self.travels, "1 or more")
        require_option(0.0 <= self.eta <= 1.0, "freedom.eta", self.eta, "0 to 1")

    def plan(self, steps: int) -> list[tuple[int, bool]]:
        """Returns of each step but the last, which ends at x0, how often it is taken, and if it is guided."""
        left = [(steps - 1 - index) / steps for index in range(steps - 1)]
        return [
            (
                self.travels if self.travelled[0] <= share < self.travelled[1] else 1,
                self.guided[0] <= share < self.guided[1],
            )
            for share in left
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class DymoOptions:
    """DyMO: steps are moved along the gradients of two objectives, and repeated.

    The preference objective is the reward. The semantic one wants attributes where their entity is, and
    entities apart.
    """

    semantic: Semantic = "auto"
    """Whether the semantic objective is used: auto does where the base model has cross-attention (SD 1.5,
    SDXL, the embedded model) and the prompt's entities are known; on refuses other base models and lists."""
    entities: Path = Path()
    """JSON file of entities with their attributes, in each prompt's order and words:
    {"a red car and a bench": [["car", "red"], ["bench"]]}. Without one, GenEval's metadata tells them."""
    scale: float = 100.0
    """Factor on the reward. It decides how both objectives mix and how often steps are repeated; 100 is the
    authors' for cosines, which HPSv2 and CLIP are here. PickScore here has the factor already: give it 1."""
    strength: float = 1.0
    """Factor on the authors' step sizes."""
    optimised: tuple[float, float] = (0.0, 1.0)
    """Steps that are moved, as shares of the run; SDXL's end at 0.92 at the latest."""
    most_repeats: int = 4
    """How often a step is repeated at most; the authors have no limit."""
    eta: float = 1.0
    """Noise of the steps; 1 is DDPM's."""

    def check(self) -> None:
        """Raises HyperAlignError on a value out of range."""
        low, high = self.optimised
        require_option(0.0 <= low <= high <= 1.0, "dymo.optimised", (low, high), "0 <= low <= high <= 1")
        for name in ("scale", "strength"):
            require_option(
                0.0 < getattr(self, name) < float("inf"), f"dymo.{name}", getattr(self, name), "above 0"
            )
        require_option(self.most_repeats >= 0, "dymo.most_repeats", self.most_repeats, "0 or more")
        require_option(0.0 <= self.eta <= 1.0, "dymo.eta", self.eta, "0 to 1")
        if self.semantic == "off" and self.entities != Path():
            raise HyperAlignError(
                f"--dymo.entities is {self.entities} and --dymo.semantic is off; expected one of them. Leave "
                "out the file, or take --dymo.semantic on."
            )

    def moved_steps(self, steps: int) -> int:
        """Returns how many steps of a run are moved; the last one, which ends at x0, is not."""
        low, high = self.optimised
        return sum(low <= index / steps < high for index in range(steps - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to draw. Give at most one of --hypernetwork, --lora, --fine-tuned and --test-time."""

    prompts: Path
    """Prompts: .txt, .jsonl (GenEval's metadata is kept), .json, .parquet or .tsv."""
    out: Path
    """Folder of the images, in GenEval's layout; the same command resumes."""
    recipe: Path = Path()
    """Recipe whose base model, precision, sampler and rewards are used."""
    model: Path = Path()
    """Folder of a base model in diffusers' layout, instead of the recipe's or without a recipe."""
    hypernetwork: Path = Path()
    """File of a hypernetwork; its header says whether it is S, P, I or static."""
    lora: Path = Path()
    """File of a LoRA in any of the forms that diffusers reads."""
    fine_tuned: Path = Path()
    """Folder of a fine-tuned U-Net or transformer in diffusers' layout."""
    test_time: TestTime = "none"
    """Method that needs no training: a search over the initial noise (best-of-N, epsilon-greedy, zero-order)
    or over each step's (epsilon-greedy-steps), or guidance by the reward's gradient."""
    strength: float = 1.0
    """Of the hypernetwork or the LoRA; 1 as trained."""
    rewards: dict[str, float] = field(default_factory=dict[str, float])
    """Rewards of the test-time method with their weights; empty takes those that the recipe optimises."""
    search: SearchOptions = field(default_factory=SearchOptions)
    step_search: StepSearchOptions = field(default_factory=StepSearchOptions)
    guidance: GuidanceOptions = field(default_factory=GuidanceOptions)
    das: DasOptions = field(default_factory=DasOptions)
    freedom: FreedomOptions = field(default_factory=FreedomOptions)
    dymo: DymoOptions = field(default_factory=DymoOptions)
    steps: int = 0
    """Sampling steps; 0 takes the recipe's validation.steps."""
    cfg: float = 0.0
    """Scale of classifier-free guidance, FLUX.1's input guidance; 0 takes the recipe's."""
    resolution: int = 0
    """Side of the images in pixels; 0 takes the recipe's."""
    images_per_prompt: int = 4
    """Images of each prompt, with consecutive seeds; GenEval takes 4."""
    seed: int = 0
    """Of the first image of each prompt."""
    limit: int = 0
    """Draw the first so many prompts of the list; 0 takes all."""
    batch: int = 8
    """Images, or candidates of a search, that are drawn at once; lower it where memory is short."""
    precision: Precision = "recipe"
    """Of the base model; recipe takes its optim.bf16."""
    text_length: int = 0
    """FLUX.1 and SD 3.5: tokens that T5's prompts are padded to; 0 takes the longest of data.text_lengths."""

    def check(self) -> None:
        """Checks what can be checked without a file. Raises HyperAlignError."""
        for name in ("steps", "resolution", "limit", "text_length"):
            require_option(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("images_per_prompt", "batch"):
            require_option(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require_option(0 <= self.seed < 2**31, "seed", self.seed, "0 to 2147483647")
        require_option(0.0 <= self.cfg < float("inf"), "cfg", self.cfg, "0 or more")
        require_option(abs(self.strength) < float("inf"), "strength", self.strength, "a number")
        if len(self.methods) > 1:
            raise HyperAlignError(
                f"Found {' and '.join(self.methods)}; expected one method at most. Draw each into a "
                "folder of its own."
            )
        if self.searches:
            self.search.plan(self.test_time, 0, self.batch)
        for own in (self.step_search, self.guidance, self.das, self.freedom, self.dymo):
            own.check()

    @property
    def methods(self) -> list[str]:
        """The options of the chosen methods."""
        chosen = {
            "--hypernetwork": self.hypernetwork != Path(),
            "--lora": self.lora != Path(),
            "--fine-tuned": self.fine_tuned != Path(),
            f"--test-time {self.test_time}": self.test_time != "none",
        }
        return [name for name, given in chosen.items() if given]

    @property
    def searches(self) -> bool:
        """Whether the method is a search over the initial noise."""
        return self.test_time in SEARCHES

    @property
    def one_at_a_time(self) -> bool:
        """Whether the method draws one image at a time, whatever the batch is."""
        return self.searches or self.test_time in ("epsilon-greedy-steps", "das", "dymo")

    @property
    def method_path(self) -> Path | None:
        """The file or folder of the method."""
        given = [path for path in (self.hypernetwork, self.lora, self.fine_tuned) if path != Path()]
        return given[0] if given else None


def configured(options: Options) -> TrainConfig:
    """Returns the recipe's configuration with what the options change.

    `validation.steps` and `objective.guidance_scale` are those of sampling, `data.text_lengths` has one
    length, and `objective.rewards` are the test-time method's.

    Raises:
        HyperAlignError: neither recipe nor model, a damaged recipe, or a test-time method without a reward.
    """
    config = _base_config(options)
    objective, optim, model = config.objective, config.optim, config.model
    if options.test_time != "none" and not (options.rewards or objective.rewards):
        raise HyperAlignError(
            f"--test-time {options.test_time} has no reward. Give one, such as --rewards pickscore 1."
        )
    bf16 = optim.bf16 if options.precision == "recipe" else options.precision == "bfloat16"
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, resolution=options.resolution or model.resolution),
        objective=dataclasses.replace(
            objective,
            rewards=options.rewards or objective.rewards,
            guidance_scale=options.cfg or objective.guidance_scale,
        ),
        optim=dataclasses.replace(optim, bf16=bf16),
        data=dataclasses.replace(
            config.data, text_lengths=(options.text_length or max(config.data.text_lengths),)
        ),
        validation=dataclasses.replace(config.validation, steps=options.steps or config.validation.steps),
    )


def _base_config(options: Options) -> TrainConfig:
    """Returns the recipe, or the defaults for a base model without one."""
    if options.recipe == Path() and options.model == Path():
        raise HyperAlignError(
            "There is no base model. Give --recipe, such as train/recipes/tiny_s.toml, or --model with a "
            "folder in diffusers' layout."
        )
    if options.recipe != Path():
        config = load_recipe(options.recipe)
        if options.model == Path():
            return config
        if (found := base_of_folder(options.model)) != config.model.base:
            raise HyperAlignError(
                f"{options.model} is a model of {found}, the recipe {options.recipe.name} is for "
                f"{config.model.base}. Give a recipe for {found}, or none."
            )
        return dataclasses.replace(config, model=dataclasses.replace(config.model, path=options.model))
    base, default = base_of_folder(options.model), TrainConfig()
    return dataclasses.replace(
        default,
        model=dataclasses.replace(
            default.model, base=base, path=options.model, resolution=RESOLUTIONS.get(base, 1024)
        ),
        objective=dataclasses.replace(
            default.objective, rewards={}, reward_weight=0.0, guidance_scale=GUIDANCE_SCALES.get(base, 7.5)
        ),
        validation=dataclasses.replace(default.validation, steps=STEPS),
    )


def require_option(holds: bool, name: str, found: object, expected: str) -> None:
    """Raises HyperAlignError with an option's name, its value and what was expected, unless `holds`."""
    if not holds:
        raise HyperAlignError(f"--{name.replace('_', '-')} is {found}; expected {expected}. Change it.")
