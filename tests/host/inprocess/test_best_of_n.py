"""Best-of-N on the tiny model: the host's own images, flat memory, and Cancel keeps the best so far."""

from __future__ import annotations

import asyncio
import gc
import importlib
import itertools
from types import ModuleType
from typing import Any

import pytest
import torch

PROMPT = "a red heart"


class Scorer:
    """A reward that calls a function after each score."""

    def __init__(self, reward: Any, after: Any) -> None:
        self.name, self.combination = reward.name, reward.combination
        self.seen: list[float] = []
        self._reward, self._after = reward, after

    def score(self, images: Any, prompts: Any) -> list[float]:
        scores = self._reward.score(images, prompts)
        self.seen += scores
        self._after(self)
        return scores


class Decoder:
    """A VAE whose images are changed, each by its place among all that were decoded."""

    def __init__(self, vae: Any, change: Any) -> None:
        self._vae, self._change, self._count = vae, change, itertools.count()

    def decode(self, latents: Any) -> Any:
        return torch.stack([self._change(image, next(self._count)) for image in self._vae.decode(latents)])


def diverging(vae: Any, *places: int) -> Decoder:
    return Decoder(vae, lambda image, place: image * float("nan") if place in places else image)


@pytest.fixture(scope="module")
def node(pack: ModuleType) -> Any:
    return importlib.import_module(f"{pack.__name__}.nodes.best_of_n").HyperAlignBestOfN


@pytest.fixture(scope="module")
def reward(pack: ModuleType) -> Any:
    rewards = importlib.import_module(f"{pack.__name__}.hyperalign.hosts.comfy.rewards")
    tiny = importlib.import_module(f"{pack.__name__}.hyperalign.rewards.tiny")
    return rewards.hosted(tiny.load("tiny reward"))


@pytest.fixture
def best(node: Any, tiny: Any, reward: Any) -> Any:
    settings = {
        "seed": 40, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
        "count": 5, "mode": "best-of-N", "batch_size": 1, "keep": 1, "early_stop": False, "threshold": 0.0,
        "radius": 0.5, "epsilon": 0.4, "round_size": 2,
    }  # fmt: skip

    def run(**changes: Any) -> list[Any]:
        inputs = {
            "model": tiny.model, "positive": tiny.condition(PROMPT), "negative": tiny.condition(""),
            "latent_image": {"samples": torch.zeros(1, 4, 16, 16)}, "vae": tiny.vae, "reward": reward,
            "prompt": PROMPT, **settings, **changes,
        }  # fmt: skip
        with torch.inference_mode():
            return node.execute(**inputs).result

    return run


@pytest.fixture
def ksampler(tiny: Any) -> Any:
    from hyperalign.hosts.comfy.sampling import ksample

    def run(seed: int) -> torch.Tensor:
        with torch.inference_mode():
            return ksample(
                tiny.model, seed, 2, 4.0, "euler", "normal", tiny.condition(PROMPT), tiny.condition(""),
                {"samples": torch.zeros(1, 4, 16, 16)}, 1.0,
            )["samples"]  # fmt: skip

    return run


def test_the_best_seed_wins_and_ksampler_draws_the_same(best, ksampler, tiny, reward):
    latent, images, scores, seeds, table = best(keep=5)
    assert sorted(seeds) == [40, 41, 42, 43, 44]
    assert scores == sorted(scores, reverse=True)
    assert scores == pytest.approx(reward.score(images, [PROMPT] * 5), rel=1e-4)
    assert torch.equal(latent["samples"][0], ksampler(seeds[0])[0])
    with torch.inference_mode():
        assert torch.allclose(tiny.vae.decode(latent["samples"][:1])[0], images[0], atol=1e-5)
    assert table.splitlines()[0] == "tiny reward: 5 of 5 (done)"
    alone = best()
    assert torch.equal(alone[0]["samples"][0], latent["samples"][0])
    assert (alone[2], alone[3]) == (scores[:1], seeds[:1])


def test_the_result_is_no_empty_latent_of_another_model_s_size(best):
    empty = {"samples": torch.zeros(1, 4, 16, 16), "downscale_ratio_spacial": 4, "type": "image"}
    assert best(count=1, latent_image=empty)[0].keys() == {"samples", "type"}


def test_batches_draw_the_same_images(best):
    single, batched = best(keep=5), best(keep=5, batch_size=2)
    assert single[3] == batched[3]
    assert torch.allclose(single[1], batched[1], atol=1e-3)


@pytest.mark.parametrize("mode", ["zero-order", "epsilon-greedy"])
def test_noise_search_is_reproducible_and_differs_from_fresh_seeds(best, mode):
    first, again = best(mode=mode, keep=5), best(mode=mode, keep=5)
    assert torch.equal(first[1], again[1])
    assert first[4] != best(keep=5)[4]


STEPS = {"mode": "epsilon-greedy-steps", "sampler_name": "euler_ancestral", "steps": 3, "iterations": 3}


def test_searching_every_step_s_noise_beats_the_sampler_s_own_and_is_reproducible(best):
    first, again = best(**STEPS, count=1, radius=0.15), best(**STEPS, count=1, radius=0.15)
    assert torch.equal(first[1], again[1])
    seeds = range(41, 47)  # a step's best noise need not be the run's: on average it is better
    plain = [best(sampler_name="euler_ancestral", steps=3, count=1, seed=seed)[2][0] for seed in seeds]
    rounds = STEPS | {"count": 1, "radius": 0.15, "round_size": 4, "batch_size": 4}
    searched = [best(**rounds, seed=seed)[2][0] for seed in seeds]
    assert sum(searched) > sum(plain)
    assert first[4].splitlines()[0] == "tiny reward: 1 of 1 (done)"
    batched = best(**STEPS, count=1, radius=0.15, batch_size=2)
    assert torch.allclose(first[1], batched[1], atol=1e-3)


@pytest.mark.parametrize("variant", ["S", "P", "I"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_rejected_candidates_leave_no_weights_and_no_trace(
    best, pack, tiny, save_hyperalign, tmp_path, monkeypatch, variant, batch_size
):
    """Each step has an evaluation of its own and six of candidates, which I serves with the run's weights."""
    host, tracing, generation = (
        importlib.import_module(f"{pack.__name__}.hyperalign.hosts.{name}")
        for name in ("comfy.model", "tracing", "generation")
    )
    made, recorder = list[int](), tracing.Recorder(keeps_predictions=True)
    cores = generation.Generator.cores

    def counted(generator, features, text_BLC):
        made.append(len(text_BLC))
        return cores(generator, features, text_BLC)

    monkeypatch.setattr(generation.Generator, "cores", counted)
    hypernetwork = host.load(save_hyperalign(tmp_path / "made.safetensors", variant=variant))
    model = host.apply(tiny.model, hypernetwork, recorder=recorder)
    best(**STEPS | {"steps": 4, "model": model, "count": 1, "batch_size": batch_size})
    trace = recorder.select().trace()
    assert len(trace.times) == 4
    assert list(trace.times) == sorted(trace.times, reverse=True)
    assert trace.predictions_EBCHW.shape == (4, 1, 4, 16, 16)
    due = {"S": (0, 1, 2, 3), "P": (0, *first_after(trace.times, (0.8, 0.5))), "I": (0,)}[variant]
    assert {track.generated_at for track in trace.tracks} == {due}
    if variant == "I":
        assert len(made) == 1


def first_after(times, keys):
    """The first evaluation at or below each key time."""
    return tuple(next(index for index, u in enumerate(times) if u <= key) for key in keys)


@pytest.mark.parametrize("sampler", ["dpm_2_ancestral", "dpmpp_2s_ancestral", "ddpm", "lcm"])
def test_a_search_of_steps_is_the_host_s_sampler_where_all_noise_is_zero(best, tiny, monkeypatch, sampler):
    import comfy.sample
    from comfy.k_diffusion import sampling as k_diffusion

    from hyperalign.hosts.comfy import trajectory as comfy_trajectory
    from hyperalign.hosts.comfy.trajectory import sigmas
    from hyperalign.search import Plan

    monkeypatch.setattr(comfy_trajectory, "epsilon_greedy", lambda plan, fresh, rate, chance: 0 * fresh())
    levels = sigmas(tiny.model, sampler, "normal", 4, 1.0)
    original = getattr(k_diffusion, f"sample_{sampler}")

    def silent(*args: Any, **options: Any) -> torch.Tensor:
        return original(*args, **options, noise_sampler=lambda *_: torch.zeros_like(args[1]))

    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        drawn = [
            comfy.sample.sample_custom(
                tiny.model, noise, 4.0, way, levels, tiny.condition(PROMPT), tiny.condition(""),
                torch.zeros_like(noise), seed=1, disable_pbar=True,
            )
            for way in (
                comfy.samplers.KSAMPLER(silent),
                comfy_trajectory.sampler(sampler, Plan(1), 1, lambda latents: [0.0] * len(latents)),
            )
        ]  # fmt: skip
    assert torch.allclose(drawn[0], drawn[1], atol=1e-4)


def test_a_search_of_steps_keeps_finished_images_when_cancelled(comfy, best, reward):
    from comfy.model_management import interrupt_current_processing

    # Three images each: two steps of three rounds of two noises, and the finished one.
    scorer = Scorer(reward, lambda self: len(self.seen) == 20 and interrupt_current_processing())
    _, _, scores, seeds, table = best(**STEPS, reward=scorer, count=100)
    assert "1 of 100 (cancelled" in table
    assert (scores, seeds) == ([scorer.seen[12]], [40])


def test_a_sampler_without_noise_of_its_own_cannot_be_searched(best):
    with pytest.raises(Exception, match="euler adds none"):
        best(mode="epsilon-greedy-steps")


def test_an_early_stop_leaves_the_rest_undrawn(best):
    scores = sorted(best(keep=5)[2])
    table = best(early_stop=True, threshold=scores[0] - 1.0)[4]
    assert "1 of 5" in table


def test_cancel_in_the_middle_returns_the_best_so_far(comfy, best, reward, node):
    from comfy.model_management import interrupt_current_processing, processing_interrupted

    scorer = Scorer(reward, lambda self: len(self.seen) == 3 and interrupt_current_processing())
    before = node.fingerprint_inputs(seed=40)
    _, images, scores, _, table = best(reward=scorer, count=100)
    assert len(scorer.seen) == 3
    assert scores == [max(scorer.seen)]
    assert scores == pytest.approx(reward.score(images, [PROMPT]), rel=1e-4)
    assert "3 of 100 (cancelled, best so far)" in table
    assert not processing_interrupted()
    assert node.fingerprint_inputs(seed=40) != before  # the host must not take it for the whole search
    assert node.fingerprint_inputs(seed=41) == 0


def test_a_cancelled_search_runs_again_where_a_node_gives_the_seed(comfy, best, reward, node, monkeypatch):
    from comfy.model_management import interrupt_current_processing
    from comfy_execution.graph import DynamicPrompt
    from execution import IsChangedCache

    import nodes

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "HyperAlignBestOfN", node)

    def key(seed: Any) -> Any:
        prompt = {"2": {"class_type": "HyperAlignBestOfN", "inputs": {"seed": seed}}}
        return asyncio.run(IsChangedCache("test", DynamicPrompt(prompt), None).get("2"))

    before = key(["1", 0]), key(45), key(46)
    scorer = Scorer(reward, lambda self: len(self.seen) == 1 and interrupt_current_processing())
    best(reward=scorer, count=100, seed=45)
    after = key(["1", 0]), key(45), key(46)
    assert [first != second for first, second in zip(before, after, strict=True)] == [True, True, False]


def test_cancel_within_a_sample_keeps_those_before_it(comfy, best, reward, tiny):
    from comfy.model_management import interrupt_current_processing

    steps = []

    def cancel_in_the_third(apply_model: Any, arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 5:  # two steps each
            interrupt_current_processing()
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model = tiny.model.clone()
    model.set_model_unet_function_wrapper(cancel_in_the_third)
    assert "2 of 100 (cancelled" in best(model=model, count=100)[4]


def test_cancel_before_the_first_sample_is_the_host_s_own(comfy, best, tiny):
    from comfy.model_management import InterruptProcessingException, interrupt_current_processing

    interrupt_current_processing()
    with pytest.raises(InterruptProcessingException):
        best()


def test_progress_runs_over_all_samples_and_shows_the_best(comfy, best, monkeypatch):
    import comfy.utils

    seen: list[tuple[int, int, Any]] = []
    hook = lambda value, total, preview, node_id=None: seen.append((value, total, preview))  # noqa: E731
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    best()
    values = [value for value, _, _ in seen]
    assert values == sorted(values)
    assert (values[-1], seen[-1][1]) == (10, 10)
    assert sum(preview is not None for *_, preview in seen) >= 5


def test_the_best_is_shown_beside_the_one_in_the_making(comfy, best, tiny, monkeypatch):
    import comfy.utils
    from comfy.cli_args import LatentPreviewMethod, args

    sizes: list[tuple[int, int]] = []
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(tiny.model.model.latent_format, "latent_rgb_factors", [[0.3, 0.2, 0.1]] * 4)
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda v, t, preview, node_id=None: sizes.append(preview[1].size)
    )
    best(count=2)
    assert sizes == [(16, 16), (16, 16), (64, 64), (128, 64), (128, 64), (64, 64)]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_sample_that_diverged_has_failed_and_the_others_are_kept(best, tiny, batch_size):
    whole = dict(zip(*best(keep=5)[3:1:-1], strict=True))
    _, images, scores, seeds, table = best(keep=5, vae=diverging(tiny.vae, 0, 3), batch_size=batch_size)
    assert sorted(seeds) == [41, 42, 44]
    assert scores == pytest.approx([whole[seed] for seed in seeds], rel=1e-3)
    assert bool(images.isfinite().all())
    assert table.splitlines()[0] == "tiny reward: 5 of 5 (done, 2 failed)"
    assert [line.split()[2] for line in table.splitlines() if "failed" in line.split()] == ["40", "43"]


def test_a_score_that_is_no_number_fails_its_sample_alone(best, pack, reward, recomputed):
    tiny = importlib.import_module(f"{pack.__name__}.hyperalign.rewards.tiny")
    rewards = importlib.import_module(f"{pack.__name__}.hyperalign.hosts.comfy.rewards")
    own, places = tiny.load("tiny reward"), itertools.count()

    class Overflowing:
        name, module = own.name, own.module

        def score(self, images: Any, prompts: Any) -> torch.Tensor:
            scores = own.score(images, prompts)
            return torch.tensor([float("inf") if next(places) == 3 else float(score) for score in scores])

    whole = best(keep=5)
    _, _, scores, seeds, table = best(keep=5, reward=rewards.hosted(Overflowing()), batch_size=2)
    assert seeds == [seed for seed in whole[3] if seed != 43]
    assert "done, 1 failed" in table
    expected = [score for score, seed in zip(*whole[2:4], strict=True) if seed != 43]
    assert scores == recomputed(expected)


def test_a_step_s_noise_whose_image_diverged_is_not_taken(best, tiny):
    # The images foreseen: two steps of one round of two noises, then the finished one.
    _, images, *_, table = best(**STEPS | {"iterations": 1}, count=1, vae=diverging(tiny.vae, 0, 3))
    assert "1 of 1 (done)" in table
    assert bool(images.isfinite().all())


def test_the_search_fails_only_if_every_sample_does(best, tiny):
    with pytest.raises(Exception, match="All 5 samples have NaN or infinite pixels") as caught:
        best(vae=diverging(tiny.vae, *range(5)), batch_size=2)
    assert type(caught.value).__name__ == "HyperAlignError"


def test_a_vae_that_decodes_to_a_video_of_one_frame_will_do(best, tiny):
    class Timed(Decoder):
        def decode(self, latents: Any) -> Any:
            return super().decode(latents)[:, None]

    plain = best(keep=3, count=3)
    timed = best(keep=3, count=3, batch_size=2, vae=Timed(tiny.vae, lambda image, place: image))
    assert (timed[1].shape, timed[3]) == (plain[1].shape, plain[3])


def test_frames_are_laid_out_as_by_the_host_s_decoder_and_videos_are_refused(pack):
    from comfy.ldm.wan.vae import WanVAE
    from comfy.sd import VAE

    import nodes

    search = importlib.import_module(f"{pack.__name__}.hyperalign.hosts.comfy.search")
    network = WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])
    with torch.inference_mode():
        vae = VAE({key: torch.full_like(value, 0.1) for key, value in network.state_dict().items()})
        one, several = torch.randn(2, 16, 1, 4, 4), torch.randn(1, 16, 2, 4, 4)
        images = search.decoded(vae, one)
        assert torch.equal(images, nodes.VAEDecode().decode(vae, {"samples": one})[0])
        assert images.shape == (2, 32, 32, 3)
        with pytest.raises(Exception, match="5 images of 1 latents"):
            search.decoded(vae, several)


def test_memory_does_not_grow_with_the_number_of_samples(best, reward):
    sizes = []

    def weigh(scorer: Scorer) -> None:
        if len(scorer.seen) in (3, 16):
            gc.collect()
            sizes.append(sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor))

    best(reward=Scorer(reward, weigh), count=16, steps=1)
    image = 64 * 64 * 3 * 4
    assert sizes[1] <= sizes[0] + 3 * image  # 13 more have been drawn


def test_every_sample_is_aligned_where_there_is_a_hypernetwork(best, pack, save_hyperalign, tmp_path):
    load = importlib.import_module(f"{pack.__name__}.hyperalign.hosts.comfy.model").load
    hypernetwork = load(save_hyperalign(tmp_path / "made.safetensors"))
    base, off, on = best(), best(hypernetwork=hypernetwork, strength=0.0), best(hypernetwork=hypernetwork)
    assert torch.equal(base[1], off[1])
    assert not torch.equal(base[1], on[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_image": {"samples": torch.zeros(2, 4, 16, 16)}}, "2 latents to start from; expected 1"),
        ({"latent_image": {"samples": torch.zeros(1, 4, 3, 16, 16)}}, "latent of 3 frames; expected 1"),
        ({"steps": 0}, "steps is 0"),
        ({"count": 0}, "count is 0"),
        ({"prompt": "a zebra"}, "'zebra'"),
    ],
)
def test_what_cannot_be_searched_is_refused(best, changes, message):
    with pytest.raises(Exception, match=message):
        best(**changes)


def test_ranks_are_refused(best, pack):
    rewards = importlib.import_module(f"{pack.__name__}.hyperalign.hosts.comfy.rewards")
    tiny = importlib.import_module(f"{pack.__name__}.hyperalign.rewards.tiny")
    first, second = (rewards.hosted(tiny.load(name)) for name in tiny.NAMES)
    with pytest.raises(Exception, match="Ranks compare the images of one batch"):
        best(reward=rewards.chained(first, second, 1.0, "rank", {}))
