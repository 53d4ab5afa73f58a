"""The oracle of benchmarks.conditioning: how much there is to gain from weights for one prompt.

A static LoRA is trained for each of some validation prompts, on preference images of that prompt alone. No
method can know its prompt so well: it bounds what conditioning on the prompt can give at this rank.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from hyperalign.checkpoint import HyperAlign
from hyperalign.files import write_text
from hyperalign.tiny.prompts import Content
from train.config import TrainConfig
from train.data.streams import PromptList
from train.inputs import load_inputs
from train.models.tiny import Tiny
from train.sampling import sample
from train.tiny.art import Style
from train.tiny.dataset import PreferenceLatents, SceneEncoder, validation_prompts
from train.tiny.evaluate import PROMPT_SEED, judged
from train.tiny.inputs import EmojiScenes
from train.trainer import Trainer


@dataclass(frozen=True, slots=True)
class OraclePlan:
    """The trainings of the oracle, and the images they are judged by."""

    prompts: int = 24
    """The first of the validation prompts, the six families in turn; 0 leaves the oracle out."""
    steps: int = 60
    batch: int = 16
    """Preference images a step."""
    rate: float = 2e-3
    scenes: int = 128
    """Different images of the prompt."""

    def config_of(self, recipe: TrainConfig, out: Path) -> TrainConfig:
        """Returns the recipe of a LoRA for one prompt."""
        return dataclasses.replace(
            recipe,
            network=dataclasses.replace(recipe.network, conditioning="none"),
            objective=dataclasses.replace(
                recipe.objective, preference_batch=self.batch, prompt_batch=1, timesteps=1
            ),
            optim=dataclasses.replace(recipe.optim, lr=self.rate, steps=self.steps),
            validation=dataclasses.replace(recipe.validation, every=0),
            run=dataclasses.replace(recipe.run, out=out),
        )

    def trained(
        self, recipe: TrainConfig, base: Tiny, prompt: str, content: Content, out: Path
    ) -> HyperAlign:
        """Trains a LoRA on one prompt alone."""
        config, accelerator = self.config_of(recipe, out), Accelerator(cpu=True)
        inputs = load_inputs(config, accelerator)
        encode = SceneEncoder(base.model, config.data.cache, random.Random(config.data.seed))
        looks: list[tuple[Content, Style]] = [(content, "fluent")] * self.scenes
        latents = encode(looks)
        scenes = EmojiScenes(PreferenceLatents(latents, [prompt] * self.scenes))
        alone = dataclasses.replace(inputs, prompts=PromptList([prompt]), preference=scenes)
        trainer = Trainer(config, alone, accelerator)
        trainer.fit()
        return trainer.averaged()


def oracle_scores(
    plan: OraclePlan,
    recipe: TrainConfig,
    base: Tiny,
    wordings: Sequence[str],
    *,
    noises: int,
    sampling_steps: int,
    guidance_scale: float,
    out: Path,
) -> dict[str, list[float]]:
    """Returns by figure the mean score of each prompt's images by its own LoRA.

    The prompts and their noise are the first of those that every other method is measured with. What is
    trained and measured is kept in `out`.
    """
    found: dict[str, list[float]] = {}
    for index, (prompt, content) in enumerate(validation_prompts(plan.prompts, PROMPT_SEED, wordings)):
        folder = out / f"prompt{index:02d}-lr{plan.rate:g}-steps{plan.steps}"
        path = folder / f"scores-{noises}-{sampling_steps}.json"
        if not path.exists():
            hyperalign = plan.trained(recipe, base, prompt, content, folder)
            images = sample(
                base, base, hyperalign, [prompt], seeds=range(noises), steps=sampling_steps,
                guidance_scale=guidance_scale, indices=[index],
            )  # fmt: skip
            scores = {name: float(value[0]) for name, value in judged([content])[0](images).items()}
            write_text(path, json.dumps(scores))
        for name, value in json.loads(path.read_text(encoding="utf-8")).items():
            found.setdefault(name, []).append(value)
    return found
