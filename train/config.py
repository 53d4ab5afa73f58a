"""The trainer's configuration: dataclass defaults < recipe TOML < command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hyperalign.hypernetwork import HyperNetworkConfig
from hyperalign.schedule import Schedule, Variant
from hyperalign.targets import PerceptionMode
from hyperalign.tiny.prompts import FAMILIES, TEMPLATES, WORDINGS, Family
from train.methods.settings import (
    PAIRED,
    AlignPropConfig,
    DpoConfig,
    GrpoConfig,
    KtoConfig,
    MethodName,
    SpoConfig,
    SrpoConfig,
)
from train.ranges import require

BaseName = Literal["tiny", "sd15", "sdxl", "flux", "sd3"]
State = Literal["rollout", "noised", "mixed"]
GradientCheckpointing = Literal["auto", "all", "decoder", "none"]
TimestepSampling = Literal["uniform", "logit_normal"]
RewardWeighting = Literal["none", "signal"]
AttentionKernel = Literal["flash", "efficient", "cudnn", "math"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The base model, and what of it the hypernetwork reads and adapts."""

    base: BaseName = "tiny"
    """Base model to align."""
    path: Path = Path()
    """Folder of the base model in diffusers' layout; empty for the embedded tiny model."""
    hub: str = ""
    """Its name on the Hugging Face hub, read only with --download."""
    resolution: int = 512
    """Side of the images in pixels; train at what you sample."""
    vae: Literal["full", "taesd"] = "full"
    """taesd decodes with a tiny autoencoder: faster, less memory, slightly blurred images."""
    taesd: Path = Path()
    """Folder of the tiny autoencoder (AutoencoderTiny)."""
    mode: PerceptionMode = "prefix"
    """prefix: middle and up blocks are adapted and perception is free; separate: all of them (the paper)."""
    perception_blocks: int = 4
    """How many of a transformer's first blocks perceive; U-Nets perceive with their whole down path."""
    variant: Variant = "S"
    """S: weights at every evaluation, P: at key times, I: once."""
    key_times: tuple[float, ...] = ()
    """Key times of P, falling fractions of the noise schedule; empty measures them on the base model."""
    key_count: int = 2
    """How many key times to find for P, besides the start."""
    statistics_prompts: int = 32
    """Prompts on whose rollouts by the base model a new run measures what features and text are standardised
    by."""
    gradient_checkpointing: GradientCheckpointing = "all"
    """What recomputes activations in its backward pass, slower but with far less memory: all; decoder, with
    the rewards but without the backbone; none; auto, what is fastest and fits the GPU by estimate."""
    channels_last: bool = False
    """Lay out the images of U-Net and decoder with their channels last, as a GPU's convolutions like them."""
    compile: bool = False
    """Compile the blocks of backbone and rewards with torch.compile; the first step takes about a minute."""

    @property
    def recomputes_backbone(self) -> bool:
        """Whether backward passes recompute the backbone's blocks."""
        return self.gradient_checkpointing in ("all", "auto")

    @property
    def recomputes_images(self) -> bool:
        """Whether they recompute the decoder and the rewards."""
        return self.gradient_checkpointing != "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """L = reward_weight * L_R + preference_weight * L_G (Eq 10), or another method's loss."""

    method: MethodName = "hyperalign"
    """hyperalign: both losses, or one of them where the other's weight is 0 (the reward alone, supervised
    fine-tuning). The others have a loss of their own, times reward_weight or preference_weight; their
    settings stand in a table of their name, those of dance_grpo and mix_grpo in [grpo]."""
    rewards: dict[str, float] = field(default_factory=lambda: {"tiny reward": 1.0})
    """Rewards by name with their weights; their weighted sum is R."""
    reward_weight: float = 1.0
    """Weight of the reward loss; 0 trains on preference images alone."""
    preference_weight: float = 1.0
    """Weight of the denoising loss on preference images; 0 invites reward hacking."""
    reward_cap: float = float("inf")
    """Scores above this have no gradient: relu(cap - score)."""
    state: State = "rollout"
    """Where x_t of the reward loss comes from: own rollouts, noised preference images, or both in turn."""
    prompt_batch: int = 16
    """Prompts of each step in each process."""
    timesteps: int = 2
    """Steps of each rollout that get a gradient."""
    rollout_steps: int = 10
    """Steps of the training sampler."""
    skip_first: int = 1
    """First steps of a rollout that get no reward gradient: x0-hat is a blur there. The shipped recipes leave
    out the steps whose signal share is below a tenth."""
    reward_weighting: RewardWeighting = "none"
    """Weight of L_R over time. signal: the image's share of the latents' variance, alpha^2 / (alpha^2 +
    sigma^2). The error of x0-hat, and with it the gradient, grows with the noise; this weight evens it out
    (`python -m benchmarks.reward_times`)."""
    reward_range: tuple[float, float] = (0.0, 0.9)
    """Range of positions in a run, 1 at its start, for the reward loss on noised images."""
    guidance_scale: float = 4.0
    """CFG scale of rollout and x0-hat; train at what you sample with. FLUX.1 has it as its input guidance."""
    conditional_only: bool = False
    """Send the reward's gradient through the conditional prediction alone: half the memory."""
    preference_batch: int = 48
    """Preference images of each step in each process."""
    preference_guidance: float = 1.0
    """FLUX.1's input guidance in the preference loss. Its target is the plain velocity, to which dev predicts
    a guided one above 1: training at the sampling guidance would undo its distillation."""
    preference_range: tuple[float, float] = (0.0, 1.0)
    """Range of positions in a run for preference images; early ones decide the composition, late ones the
    details. Positions are u for diffusion; for a flow u follows with the shift of the sampler's steps."""
    timestep_sampling: TimestepSampling = "uniform"
    """How positions are sampled in their range; logit_normal favours the middle (Esser et al. 2024)."""
    snr_gamma: float = float("inf")
    """Gamma of min-SNR weighting of the preference loss (Hang et al. 2023); inf is Eq 9 unweighted."""
    caption_dropout: float = 0.1
    """Share of preference images that train with an empty caption, where sampling uses CFG (not FLUX.1)."""
    micro_batch: int | Literal["auto"] = 0
    """Images in one backward pass, gradients accumulated; 0 takes all at once, auto as many as make the step
    fastest and fit the GPU, by estimate."""

    @property
    def images_at_once(self) -> int:
        """Images in one backward pass; 0 is all at once, as is an `auto` that was not chosen yet."""
        return 0 if self.micro_batch == "auto" else self.micro_batch

    @property
    def optimised(self) -> dict[str, float]:
        """The rewards that a loss acts on, with their weights."""
        acts = self.reward_weight and not self.needs_pairs
        return {name: weight for name, weight in self.rewards.items() if weight and acts}

    @property
    def needs_preference_images(self) -> bool:
        """Whether a loss reads preference images."""
        noised = self.reward_weight > 0 and self.state != "rollout"
        if self.method == "hyperalign":
            return self.preference_weight > 0 or noised
        return self.method == "srpo" and noised

    @property
    def needs_pairs(self) -> bool:
        """Whether the method reads pairs of images."""
        return self.method in PAIRED


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW with warm-up and a cosine to zero."""

    lr: float = 3e-4
    steps: int = 300
    """Steps of the run. May grow in a run that goes on: the rate then follows the longer cosine from there,
    as if the run had been that long from its start."""
    warmup_steps: int = 20
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.98
    """Decay of the averaged weights, which are validated and exported."""
    bf16: bool = True
    """Run the frozen models in bfloat16."""
    bad_steps: int = 20
    """Stop after this many steps in a row whose gradient is not finite; each of them is skipped."""

    def learning_rate(self, step: int) -> float:
        """Returns the rate of a step: linear warm-up, then a cosine to zero."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Prompts and preference images. The tiny model generates its own from a seed."""

    scenes: int = 12000
    """Tiny model: preference images (right captions, Fluent style) to encode once."""
    seed: int = 101
    families: tuple[Family, ...] = FAMILIES
    """Tiny model: families of training prompts and preference images; one named twice is sampled twice as
    often."""
    wordings: tuple[str, ...] = WORDINGS
    """Tiny model: wordings of training prompts and preference images. Those with palettes of their own ask
    for one correction of each colour word more: the number of palettes is how much there is to learn."""
    cache: Path = Path("build/tiny")
    """Tiny model: where fetched art and encoded scenes are kept."""
    prompts: Path = Path()
    """Training prompts: .txt, .jsonl, .json, .parquet or .tsv."""
    preference: Path = Path()
    """Folder of latent shards that `train/encode.py` wrote."""
    preference_name: str = ""
    """Name and licence of the preference dataset, for the hypernetwork's header."""
    unsafe_column: str = ""
    """For train/encode.py: the data set's own mark of unsafe images, which are excluded and counted."""
    unsafe_above: float = 0.5
    """Numbers in unsafe_column above this are unsafe."""
    embeddings: Path = Path("build/embeddings")
    """Cache of the text encoders' outputs; one run computes them, later ones read them."""
    embeddings_limit_gb: float = 200.0
    """Most that the cache may hold, in GB; a run that would fill it further is refused before it starts. A
    text of FLUX.1 takes 6.3 MB, one of SDXL 0.3."""
    text_lengths: tuple[int, ...] = (256, 512)
    """Paddings of T5's tokens, sampled for each batch: for FLUX.1, ComfyUI pads to 256, diffusers to 512."""
    rewards: Path = Path("models/hyperalign_rewards")
    """Folder of the rewards' weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationConfig:
    """Metrics and images of validation prompts during training."""

    every: int = 50
    """Training steps between validations; 0 turns them off."""
    prompts: Path = Path()
    """Validation prompts, in any format that data.prompts takes. The tiny model has its own."""
    prompt_count: int = 36
    """How many of them are sampled; for the tiny model its six families in turn."""
    steps: int = 15
    """Sampling steps."""
    rewards: dict[str, float] = field(default_factory=dict[str, float])
    """Rewards that are measured and never optimised."""
    diversity_encoder: Path = Path()
    """Folder of a DINOv2 (facebook/dinov2-base) whose embeddings measure the diversity over seeds; empty
    takes those of a reward that is not optimised. The tiny model has its own encoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Outputs, seed and processor of a run."""

    out: Path = Path("runs/hyperalign")
    """Folder of log, training checkpoints, image grids and the finished hypernetwork."""
    seed: int = 0
    checkpoint_every: int = 25
    """Steps between training checkpoints."""
    keep_checkpoints: int = 2
    """How many of the last training checkpoints to keep."""
    keep_exports: int = 3
    """How many of the last validated hypernetworks to keep besides the best one."""
    init_from: Path = Path()
    """A hypernetwork of the same architecture whose weights a new run begins with; empty begins anew."""
    trackers: tuple[str, ...] = ()
    """Besides log.jsonl: tensorboard, wandb (installed and logged in by you)."""
    threads: int = 0
    """CPU threads; 0 leaves it to PyTorch."""
    attention_kernels: tuple[AttentionKernel, ...] = ("flash", "efficient", "math")
    """What computes attention on a GPU: the first of them that takes the shapes. The backward pass of cudnn
    breaks off FLUX.1's training on an H100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    network: HyperNetworkConfig = field(default_factory=HyperNetworkConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    alignprop: AlignPropConfig = field(default_factory=AlignPropConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    kto: KtoConfig = field(default_factory=KtoConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    srpo: SrpoConfig = field(default_factory=SrpoConfig)
    spo: SpoConfig = field(default_factory=SpoConfig)

    def __post_init__(self) -> None:
        """Checks ranges. Raises HyperAlignError."""
        self._check_objective()
        self._check_method()
        p, run = self.optim, self.run
        prompts = self.model.statistics_prompts
        require(prompts >= 2, "model.statistics_prompts", prompts, "2 or more")
        require(p.steps >= 1, "optim.steps", p.steps, "1 or more")
        require(p.lr > 0, "optim.lr", p.lr, "above 0")
        require(p.max_grad_norm > 0, "optim.max_grad_norm", p.max_grad_norm, "above 0")
        require(0 <= p.ema_decay < 1, "optim.ema_decay", p.ema_decay, "0 up to 1")
        require(p.bad_steps >= 1, "optim.bad_steps", p.bad_steps, "1 or more")
        require(
            self.data.scenes >= self.objective.preference_batch,
            "data.scenes", self.data.scenes, "objective.preference_batch or more",
        )  # fmt: skip
        known = [template for template in self.data.wordings if template in TEMPLATES]
        require(
            bool(known) and len(known) == len(self.data.wordings),
            "data.wordings", self.data.wordings, "some of " + ", ".join(map(repr, TEMPLATES)),
        )  # fmt: skip
        require(bool(self.data.families), "data.families", self.data.families, "one or more")
        require(bool(run.attention_kernels), "run.attention_kernels", run.attention_kernels, "one or more")
        require(run.checkpoint_every >= 1, "run.checkpoint_every", run.checkpoint_every, "1 or more")
        require(run.keep_checkpoints >= 1, "run.keep_checkpoints", run.keep_checkpoints, "1 or more")
        require(run.keep_exports >= 0, "run.keep_exports", run.keep_exports, "0 or more")
        require(
            self.model.resolution % 64 == 0, "model.resolution", self.model.resolution, "a multiple of 64"
        )
        lengths = self.data.text_lengths
        require(bool(lengths) and min(lengths) > 0, "data.text_lengths", lengths, "numbers above 0")
        limit = self.data.embeddings_limit_gb
        require(limit > 0, "data.embeddings_limit_gb", limit, "above 0")
        above = self.data.unsafe_above
        require(math.isfinite(above), "data.unsafe_above", above, "a number")
        if self.model.key_times or self.model.variant != "P":
            self.schedule()

    def _check_objective(self) -> None:
        o = self.objective
        require(o.reward_weight >= 0, "objective.reward_weight", o.reward_weight, "0 or more")
        require(o.preference_weight >= 0, "objective.preference_weight", o.preference_weight, "0 or more")
        require(
            o.reward_weight + o.preference_weight > 0, "objective weights", "both 0", "at least one above 0"
        )
        require(bool(o.rewards) or o.reward_weight == 0, "objective.rewards", "empty", "a reward")
        finite = all(math.isfinite(weight) for weight in o.rewards.values())
        require(finite, "objective.rewards", o.rewards, "finite weights")
        require(o.rollout_steps >= 2, "objective.rollout_steps", o.rollout_steps, "2 or more")
        room, steps = o.rollout_steps - o.skip_first, o.rollout_steps
        require(0 <= o.skip_first < steps, "objective.skip_first", o.skip_first, "0 to rollout_steps - 1")
        require(1 <= o.timesteps <= room, "objective.timesteps", o.timesteps, f"1 to {room}")
        require(o.prompt_batch >= 1, "objective.prompt_batch", o.prompt_batch, "1 or more")
        require(o.preference_batch >= 1, "objective.preference_batch", o.preference_batch, "1 or more")
        for name in ("preference_range", "reward_range"):
            low, high = getattr(o, name)
            require(0 <= low < high <= 1, f"objective.{name}", (low, high), "0 <= low < high <= 1")
        require(o.snr_gamma > 0, "objective.snr_gamma", o.snr_gamma, "above 0")
        require(0 <= o.caption_dropout < 1, "objective.caption_dropout", o.caption_dropout, "0 up to 1")
        require(o.guidance_scale >= 1, "objective.guidance_scale", o.guidance_scale, "1 or more")
        require(
            o.preference_guidance >= 0, "objective.preference_guidance", o.preference_guidance, "0 or more"
        )
        require(o.images_at_once >= 0, "objective.micro_batch", o.micro_batch, "0 or more, or auto")

    def _check_method(self) -> None:
        o, steps = self.objective, self.alignprop.last_steps
        acts = o.preference_weight if o.needs_pairs else o.reward_weight
        name = "objective.preference_weight" if o.needs_pairs else "objective.reward_weight"
        require(o.method == "hyperalign" or acts > 0, name, acts, f"above 0 for {o.method}")
        require(steps <= o.rollout_steps, "alignprop.last_steps", steps, "at most objective.rollout_steps")
        if o.method == "spo":
            some_left = self.spo.first_step(o.rollout_steps) < o.rollout_steps - 1
            require(some_left, "spo.skipped_share", self.spo.skipped_share, "a share that leaves some steps")

    @property
    def step_reward(self) -> Path | None:
        """The step-aware preference model that the method scores with, None for none."""
        is_read = self.objective.method == "spo" and self.spo.step_reward != Path()
        return self.spo.step_reward if is_read else None

    def schedule(self) -> Schedule:
        """Returns the schedule. Raises HyperAlignError if key times are wrong."""
        return Schedule(self.model.variant, self.model.key_times)
