"""Reward nodes with the tiny rewards: chains, badges, saved scores, missing weights."""

from __future__ import annotations

import csv
import gc
import importlib
import json
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from hyperalign.errors import HyperAlignError

PROMPT = "a red heart"
TINY, VALIDATION = "tiny reward", "tiny validation reward"


@pytest.fixture
def folders(comfy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host's folders, empty and for one test."""
    import folder_paths

    from hyperalign.hosts.comfy.reward_files import FOLDER

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    rewards = tmp_path / "models" / FOLDER
    monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER, ([str(rewards)], {".safetensors"}))
    return tmp_path


@pytest.fixture
def nodes(pack: ModuleType, folders: Path) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.nodes.rewards")


@dataclass(frozen=True)
class Overflowing:
    """A reward whose second score is no number."""

    value: float
    name: str = "overflowing"
    module: torch.nn.Module = field(default_factory=lambda: torch.nn.Linear(1, 1))

    def score(self, images_BCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([self.value if index == 1 else 0.5 for index in range(len(images_BCHW))])


class Hub(BaseHTTPRequestHandler):
    """Serves every file with the same bytes."""

    content = bytes(1 << 22)

    def do_GET(self) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:])

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test's output clean."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub on this machine in place of the official one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


def refusal(function: Any, *args: Any) -> str:
    """The message of an error of ours; the pack under test has its own copy of the class."""
    with pytest.raises(Exception) as caught:
        function(*args)
    assert HyperAlignError.__name__ in [kind.__name__ for kind in type(caught.value).mro()]
    return str(caught.value)


def loaded(nodes: ModuleType, name: str = TINY, *args: Any, **options: Any) -> Any:
    return nodes.HyperAlignRewardLoader.execute(name, *args, **options).result[0]


def images(count: int = 3, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, 48, 64, channels, generator=torch.Generator().manual_seed(2))


def test_a_chain_is_a_weighted_sum_of_its_members(nodes):
    alone = [loaded(nodes, name).score(images(), [PROMPT] * 3) for name in (TINY, VALIDATION)]
    chain = loaded(nodes, VALIDATION, -0.5, chain=loaded(nodes, TINY, 2.0))
    batch = chain.score_batch(images(), [PROMPT] * 3)
    assert batch.name == f"{TINY} + {VALIDATION}"
    assert batch.breakdown == {TINY: pytest.approx(alone[0]), VALIDATION: pytest.approx(alone[1])}
    expected = [2.0 * first - 0.5 * second for first, second in zip(*alone, strict=True)]
    assert batch.scores == pytest.approx(expected, abs=1e-5)


def test_ranks_are_over_the_whole_batch_also_if_it_is_scored_in_parts(nodes):
    count = 19
    chain = loaded(nodes, VALIDATION, 1.0, "rank", chain=loaded(nodes))
    scores = chain.score(images(count), [PROMPT] * count)
    assert sum(scores) == pytest.approx(count / 2)


def test_z_scores_need_the_calibration_that_reward_score_keeps(nodes):
    assert "no calibration for tiny reward" in refusal(
        lambda: loaded(nodes, VALIDATION, 1.0, "z-score", chain=loaded(nodes))
    )
    both = loaded(nodes, VALIDATION, chain=loaded(nodes))
    assert nodes.HyperAlignRewardLoader.fingerprint_inputs(combination="z-score")[0] == 0.0
    nodes.HyperAlignRewardScore.execute(both, images(5), PROMPT, calibrate=True)
    assert nodes.HyperAlignRewardLoader.fingerprint_inputs(combination="z-score")[0] > 0.0
    chain = loaded(nodes, VALIDATION, 1.0, "z-score", chain=loaded(nodes))
    assert sum(chain.score(images(5), [PROMPT] * 5)) == pytest.approx(0.0, abs=1e-4)


def test_a_damaged_calibration_stops_z_scores_alone_and_is_repaired_by_calibrating(nodes, folders, caplog):
    path = folders / "models" / "hyperalign_rewards" / "calibrations.json"
    path.parent.mkdir(parents=True)
    path.write_text("{", encoding="utf-8")
    assert loaded(nodes, TINY, 1.0, "z-score").name == TINY  # alone, nothing is combined
    both = loaded(nodes, VALIDATION, chain=loaded(nodes))
    message = refusal(lambda: loaded(nodes, VALIDATION, 1.0, "z-score", chain=loaded(nodes)))
    assert "not a file of calibrations" in message
    assert "Calibrate the rewards again" in message
    nodes.HyperAlignRewardScore.execute(both, images(5), PROMPT, calibrate=True)
    assert "not a file of calibrations" in caplog.text
    assert set(json.loads(path.read_text(encoding="utf-8"))) == {TINY, VALIDATION}
    assert loaded(nodes, VALIDATION, 1.0, "z-score", chain=loaded(nodes)).score(images(1), [PROMPT])


def test_calibrating_one_reward_keeps_the_others(nodes, folders):
    for name in (TINY, VALIDATION):
        nodes.HyperAlignRewardScore.execute(loaded(nodes, name), images(5), PROMPT, calibrate=True)
    assert loaded(nodes, VALIDATION, 1.0, "z-score", chain=loaded(nodes)).score(images(1), [PROMPT])


def test_a_linked_combination_may_be_z_score(nodes):
    nodes.HyperAlignRewardScore.execute(loaded(nodes), images(5), PROMPT, calibrate=True)
    # The host knows no value.
    assert nodes.HyperAlignRewardLoader.fingerprint_inputs(combination=None)[0] > 0.0
    assert nodes.HyperAlignRewardLoader.fingerprint_inputs(combination="rank")[0] == 0.0


def test_one_reward_twice_is_refused(nodes):
    assert "none twice" in refusal(lambda: loaded(nodes, chain=loaded(nodes)))


@pytest.mark.parametrize(
    "name", ["hpsv2.1", "hpsv2", "pickscore", "imagereward", "clip", "aesthetic", "siglip-aesthetic"]
)
def test_missing_weights_are_named_before_anything_runs(nodes, folders, name):
    message = nodes.HyperAlignRewardLoader.validate_inputs(reward=name)
    assert isinstance(message, str)
    for part in (
        "There is no ",
        "B)",
        "get it from",
        str(folders / "models" / "hyperalign_rewards"),
        "download",
    ):
        assert part in message
    assert nodes.HyperAlignRewardLoader.validate_inputs(reward=name, download=True) is True
    assert message.split("(")[0] in refusal(loaded, nodes, name)


def test_another_weight_reads_no_file_again_until_the_host_unloads_the_reward(nodes):
    import comfy.model_management

    first, again = loaded(nodes), loaded(nodes, TINY, 2.0)
    assert again.members[0].reward is first.members[0].reward
    assert (first.members[0].weight, again.members[0].weight) == (1.0, 2.0)
    first.score(images(1), [PROMPT])
    comfy.model_management.unload_all_models()
    fresh = loaded(nodes)
    assert fresh.members[0].reward is not first.members[0].reward
    assert fresh.score(images(1), [PROMPT]) == first.score(images(1), [PROMPT])


def test_the_host_unloads_a_reward_that_nobody_else_has(nodes):
    import comfy.model_management

    reward = loaded(nodes)
    reward.score(images(1), [PROMPT])
    patcher = weakref.ref(reward.patchers[0])
    del reward
    gc.collect()
    assert patcher() is not None  # read once for all nodes
    comfy.model_management.unload_all_models()  # later hosts read it after they have unloaded it
    gc.collect()
    assert patcher() is None


def test_a_changed_file_is_read_again(nodes, pack, folders, monkeypatch):
    from safetensors.torch import save_file

    loading, weights, tiny = (
        importlib.import_module(f"{pack.__name__}.hyperalign.rewards.{name}")
        for name in ("loading", "weights", "tiny")
    )
    file = weights.WeightFile("small.safetensors", "", 0.0, "", dict)

    def reward(name: str, network: torch.nn.Module, preprocess: Any) -> Any:
        found = tiny.load(TINY)
        found.module.bias = network.bias
        return found

    published = loading.PublishedReward((file,), lambda: torch.nn.Linear(2, 1), torch.Tensor, reward)
    monkeypatch.setitem(loading.PUBLISHED, "small", published)
    monkeypatch.setattr(nodes, "NAMES", ("small",))
    path = folders / "models" / "hyperalign_rewards" / file.path
    path.parent.mkdir(parents=True)
    biases = []
    for value in (1.0, 1.0, 22.0):
        if not biases or value != biases[-1]:
            save_file({"weight": torch.zeros(1, 2), "bias": torch.tensor([value])}, path)
        biases.append(float(loaded(nodes, "small").members[0].reward.module.bias))
    assert biases == [1.0, 1.0, 22.0]


def test_what_lies_in_any_of_the_host_s_folders_is_found(nodes, folders, monkeypatch):
    import folder_paths

    from hyperalign.rewards.aesthetic import ENCODER, HEAD

    second = folders / "elsewhere"
    paths = [folder_paths.get_folder_paths("hyperalign_rewards")[0], str(second)]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "hyperalign_rewards", (paths, set()))
    for file in (ENCODER, HEAD):
        path = second / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not a weight file")
    assert nodes.HyperAlignRewardLoader.validate_inputs(reward="aesthetic") is True
    assert "not a whole weight file" in refusal(loaded, nodes, "aesthetic")


def test_no_file_is_asked_for_by_the_tiny_rewards(nodes):
    assert nodes.HyperAlignRewardLoader.validate_inputs(reward=TINY) is True
    assert nodes.HyperAlignRewardLoader.validate_inputs() is True


def test_scores_are_per_image_and_shown_under_each(nodes, folders):
    output = nodes.HyperAlignRewardScore.execute(loaded(nodes), images(), PROMPT)
    scores, mean, table, breakdown = output.result
    assert scores == loaded(nodes).score(images(), [PROMPT] * 3)
    assert mean == pytest.approx(sum(scores) / 3)
    assert table.count(PROMPT) == 3
    assert json.loads(breakdown) == {TINY: scores}
    assert output.ui["text"] == (table,)
    shown = [Image.open(folders / "temp" / image["filename"]) for image in output.ui["images"]]
    assert len(shown) == 3
    width, height = shown[0].size
    assert (width, height) > (64 * 3, 48 * 3)  # enlarged, and a strip more
    strips = {image.crop((0, 48 * 3, width, height)).tobytes() for image in shown}
    assert len(strips) == len({f"{score:.4f}" for score in scores})
    assert not (folders / "output").exists()


def test_saved_images_know_their_scores_and_the_table_grows(nodes, folders):
    for sidecar in ("CSV", "CSV", "JSONL", "none"):
        nodes.HyperAlignRewardScore.execute(loaded(nodes), images(), PROMPT, True, "kept/a", sidecar)
    saved = sorted((folders / "output" / "kept").glob("*.png"))
    assert len(saved) == 12
    expected = loaded(nodes).score(images(), [PROMPT] * 3)
    for path, score in zip(saved[:3], expected, strict=True):
        text = Image.open(path).text
        assert float(text["hyperalign_score"]) == score
        assert (text["hyperalign_reward"], text["hyperalign_prompt"]) == (TINY, PROMPT)
        assert json.loads(text["hyperalign_breakdown"]) == {TINY: score}
    with (saved[0].parent / "a_scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [path.name for path in saved[:6]]
    assert [float(row["score"]) for row in rows] == expected * 2
    lines = (saved[0].parent / "a_scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["score"] for line in lines] == expected


@pytest.mark.parametrize(("channels", "value"), [(1, 0.5), (4, 0.75)])  # transparent ones lie on white
def test_grey_and_transparent_images_are_scored_and_shown(nodes, channels, value):
    images = torch.full((1, 32, 32, channels), 0.5)
    output = nodes.HyperAlignRewardScore.execute(loaded(nodes), images, PROMPT, save=True)
    assert output.result[0] == pytest.approx(
        loaded(nodes).score(torch.full((1, 32, 32, 3), value), [PROMPT]), rel=1e-4
    )


def test_pixels_that_are_no_numbers_are_refused_and_nothing_is_saved(nodes, folders):
    broken = images()
    broken[1, 3, 3] = float("nan")
    message = refusal(lambda: nodes.HyperAlignRewardScore.execute(loaded(nodes), broken, PROMPT, save=True))
    assert "NaN or infinite pixels" in message
    assert not (folders / "output").exists()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_scores_that_are_no_numbers_are_refused_and_nothing_is_kept(nodes, pack, folders, value):
    hosted = importlib.import_module(f"{pack.__name__}.hyperalign.hosts.comfy.rewards").hosted
    overflowing = hosted(Overflowing(float(value)))
    for weight, chain in ((1.0, None), (0.0, loaded(nodes))):
        reward = nodes.chained(chain, overflowing, weight, "sum", {})
        message = refusal(
            lambda reward=reward: nodes.HyperAlignRewardScore.execute(
                reward, images(), PROMPT, save=True, calibrate=True
            )
        )
        assert "overflowing gives image 2 of 3 a score that is NaN or infinite" in message
    assert not (folders / "output").exists()
    assert not (folders / "models").exists()


def test_another_number_of_prompts_is_refused(nodes):
    score = partial(nodes.HyperAlignRewardScore.execute, loaded(nodes), images(), lines="one per image")
    assert "2 lines of prompts for 3 images" in refusal(score, f"{PROMPT}\na dog")
    assert "2 prompts in a list for 3 images" in refusal(score, [PROMPT, "a dog"])


def test_the_lines_of_a_prompt_are_one_prompt_unless_the_widget_says_otherwise(nodes):
    """Three lines for three images used to judge one image each; for two images, they were refused."""
    score = partial(nodes.HyperAlignRewardScore.execute, loaded(nodes), images())
    lines = ["a red circle", "a blue heart", "a green cat"]
    text = "\r\n".join(lines)
    assert score(text).result[0] == loaded(nodes).score(images(), [text] * 3)
    apart = loaded(nodes).score(images(), lines)
    assert score(text, lines="one per image").result[0] == score(lines).result[0] == apart
    assert score([text], lines=["one per image"]).result[0] == apart
    assert "lines is 'one per line'" in nodes.HyperAlignRewardScore.validate_inputs(lines=["one per line"])
    assert nodes.HyperAlignRewardScore.INPUT_IS_LIST


def test_the_table_has_one_row_for_a_prompt_of_several_lines(nodes):
    output = nodes.HyperAlignRewardScore.execute(loaded(nodes), images(), "a red\n\ncircle")
    assert output.result[2].count("a red circle\n") == 3


def test_a_list_of_batches_is_scored_as_the_host_pairs_lists(nodes, folders):
    """Nodes that work on lists hand on one batch for each prompt; sizes may differ."""
    batches = [images(), images()[:2, :24]]
    output = nodes.HyperAlignRewardScore.execute(
        [loaded(nodes)], batches, ["a red circle", "a blue heart"], [True], ["kept/a"], ["CSV"], [False]
    )
    first = loaded(nodes).score(batches[0], ["a red circle"] * 3)
    assert output.result[0] == first + loaded(nodes).score(batches[1], ["a blue heart"] * 2)
    assert len(output.ui["images"]) == len(list((folders / "output" / "kept").glob("*.png"))) == 5
    message = refusal(nodes.HyperAlignRewardScore.execute, [loaded(nodes)] * 2, batches, [PROMPT])
    assert "reward has received a list of 2; expected one" in message


def test_images_of_one_pixel_are_scored(nodes):
    assert (
        len(nodes.HyperAlignRewardScore.execute(loaded(nodes), torch.rand(2, 1, 1, 3), PROMPT).result[0]) == 2
    )


@pytest.mark.parametrize("size", [(20_000, 4), (4, 20_000)])
def test_very_long_images_are_scored_and_shown(nodes, folders, size):
    output = nodes.HyperAlignRewardScore.execute(loaded(nodes), torch.rand(1, *size, 3), PROMPT)
    shown = Image.open(folders / "temp" / output.ui["images"][0]["filename"])
    assert shown.size == (size[1], size[0] + 14)


def test_an_empty_prompt_is_a_valid_prompt(nodes):
    assert nodes.HyperAlignRewardScore.execute(loaded(nodes), images(), " \n ").result[0] == loaded(
        nodes
    ).score(images(), [""] * 3)


def test_the_switch_downloads_with_the_host_s_bar_and_cancel_leaves_a_part(nodes, folders, hub, monkeypatch):
    import comfy.utils
    from comfy.model_management import InterruptProcessingException, interrupt_current_processing

    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(
        comfy.utils,
        "PROGRESS_BAR_HOOK",
        lambda here, total, preview, node_id=None: seen.append((here, total)),
    )
    folder = folders / "models" / "hyperalign_rewards" / "PickScore_v1"
    interrupt_current_processing()
    with pytest.raises(InterruptProcessingException):
        loaded(nodes, "pickscore", download=True)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors.partial"]
    assert "not a whole weight file" in refusal(lambda: loaded(nodes, "pickscore", download=True))
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "model.safetensors.json"}
    assert max(here for here, _ in seen) == len(Hub.content)
    assert nodes.HyperAlignRewardLoader.validate_inputs(reward="pickscore") is True
