"""GenEval's networks: full size on the meta device, small ones end to end, and the command."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from hyperalign.cli import geneval as command
from hyperalign.cli.main import main
from hyperalign.errors import HyperAlignError
from hyperalign.geneval import colors, detector, scorer
from hyperalign.geneval.detector import SWIN_SMALL, DetectorShape, SegmentedObject, postprocess
from hyperalign.geneval.prompts import COLORS, NAMES, parse_prompt
from hyperalign.geneval.rules import THRESHOLD
from train import evaluate

SMALL = DetectorShape(
    width=12, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), features=32, feedforward=32, encoder_feedforward=32,
    encoder_layers=1, decoder_layers=3, queries=7,
)  # fmt: skip
RED_DOG = {"tag": "colors", "prompt": "a red dog", "include": [{"class": "dog", "count": 1, "color": "red"}]}
TWO_DOGS = {"tag": "counting", "prompt": "two dogs", "include": [{"class": "dog", "count": 2}]}


def write_detector(folder: Path) -> Path:
    """A small detector with random weights, in the published layout."""
    torch.manual_seed(0)
    path = folder / detector.WEIGHTS.path
    network: Any = detector.network(SMALL)
    network.save_pretrained(path.parent)  # transformers writes the published names
    return path


@pytest.fixture
def weights(published: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A rewards' folder with a small detector and a small CLIP."""
    monkeypatch.setattr(detector, "SWIN_SMALL", SMALL)
    monkeypatch.setattr(detector, "SHORT_SIDE", 64)
    monkeypatch.setattr(detector, "LONG_SIDE", 96)
    folder = published("clip")
    write_detector(folder)
    return folder


def test_the_true_architecture_has_the_published_sizes() -> None:
    """Meta's Swin-S Mask2Former has 68.7 M parameters; the file of 275 MB holds them in float32."""
    with torch.device("meta"):
        state = detector.network(SWIN_SMALL).state_dict()
    assert sum(value.numel() for value in state.values()) == pytest.approx(68.74e6, rel=1e-3)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes["class_predictor.weight"] == (81, 256)
    assert shapes["model.transformer_module.queries_features.weight"] == (100, 256)
    blocks = {key.split(".blocks.")[1].split(".")[0] for key in shapes if "layers.2.blocks." in key}
    assert len(blocks) == 18


def test_the_published_layout_fills_the_whole_network(weights: Path) -> None:
    published = load_file(weights / detector.WEIGHTS.path)
    older = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self.query.weight"
    assert older in published, "transformers reads and writes the published names"
    found = detector.load(weights).state_dict()
    torch.manual_seed(0)
    expected = detector.network(SMALL).state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_transformers_progress_bar_is_hidden_here_and_kept_elsewhere(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    detector.load(weights)
    assert "Loading weights" not in capsys.readouterr().err
    assert logging.is_progress_bar_enabled() == shown


def test_buffers_that_older_releases_saved_are_ignored(weights: Path) -> None:
    path = weights / detector.WEIGHTS.path
    block = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self"
    save_file({**load_file(path), f"{block}.relative_position_index": torch.zeros(49, 49)}, path)
    detector.load(weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("class_predictor.bias"), r"1 tensors are missing \(class_predictor.bias\)"),
        (lambda state: state.update(extra=torch.ones(1)), r"1 are unknown \(extra\)"),
        (lambda state: state.update({"class_predictor.bias": torch.ones(3)}), "does not fit Mask2Former"),
        (lambda state: state["class_predictor.bias"].fill_(float("nan")), "NaN or infinite"),
    ],
)
def test_other_weights_are_refused(
    weights: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    path = weights / detector.WEIGHTS.path
    state = {key: value.clone() for key, value in load_file(path).items()}
    change(state)
    save_file(state, path)
    with pytest.raises(HyperAlignError, match=message):
        detector.load(weights)


def test_missing_weights_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        HyperAlignError, match=r"There is no model.safetensors \(0.3 GB\) in .*mask2former.*get it"
    ):
        detector.load(tmp_path)


@pytest.mark.parametrize("size", [(64, 64), (40, 100), (500, 20), (1, 1)])
def test_images_of_any_shape_pass_through_the_network(weights: Path, size: tuple[int, int]) -> None:
    network: Any = detector.load(weights)
    network.class_predictor.bias[NAMES.index("dog")] = 20.0
    found = detector.detect(network, torch.rand(3, *size))
    assert found
    for one in found:
        assert one.name == "dog"
        assert 0.3 < one.score <= 1.0
        assert one.mask_HW is not None
        assert one.mask_HW.shape == size
        assert one.box == detector.box_of(one.mask_HW)


@pytest.mark.parametrize("seed", range(3))
def test_scores_and_masks_are_those_of_transformers_own_postprocessing(seed: int) -> None:
    """Its processor always works at 384 x 384, and so does this test."""
    from transformers.models.mask2former.image_processing_mask2former import Mask2FormerImageProcessor
    from transformers.models.mask2former.modeling_mask2former import (
        Mask2FormerForUniversalSegmentationOutput as Output,
    )

    generator = torch.Generator().manual_seed(seed)
    classes_QK = torch.randn(100, len(NAMES) + 1, generator=generator) * 3
    masks_Qhw = F.interpolate(torch.randn(100, 1, 4, 4, generator=generator) * 6, size=(96, 96))[:, 0]
    output: Any = Output(class_queries_logits=classes_QK[None], masks_queries_logits=masks_Qhw[None])
    (expected,) = Mask2FormerImageProcessor().post_process_instance_segmentation(
        output, threshold=THRESHOLD, return_binary_maps=True
    )
    side = (384, 384)
    found = sorted(postprocess(classes_QK, masks_Qhw, side, side, side), key=lambda one: one.score)
    masks = zip(expected["segments_info"], expected["segmentation"], strict=True)
    pairs = sorted(masks, key=lambda pair: pair[0]["score"])
    assert len(found) == len(pairs) > 5
    for one, (info, mask_HW) in zip(found, pairs, strict=True):
        assert one.name == NAMES[info["label_id"]]
        assert one.score == pytest.approx(info["score"], abs=2e-6)
        assert one.mask_HW is not None
        assert torch.equal(one.mask_HW, mask_HW.bool())


@pytest.mark.parametrize(
    ("size", "inner", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((480, 640), (800, 1067), (800, 1088)),
        ((400, 1000), (533, 1333), (544, 1344)),
    ],
)
def test_images_are_resized_and_padded_as_mmdetection_does(
    size: tuple[int, int], inner: tuple[int, int], padded: tuple[int, int]
) -> None:
    pixels_BCHW, found = detector.preprocess(torch.ones(1, 3, *size))
    assert found == inner
    assert tuple(pixels_BCHW.shape[-2:]) == padded
    assert (
        float(pixels_BCHW[..., inner[0] :, :].abs().sum() + pixels_BCHW[..., inner[1] :].abs().sum()) == 0.0
    )
    assert float(pixels_BCHW[0, 0, 0, 0]) == pytest.approx((1 - 0.485) / 0.229, abs=1e-5)


def test_boxes_and_scores_come_from_masks_and_classes() -> None:
    classes_QK = torch.full((3, len(NAMES) + 1), -20.0)
    classes_QK[0, NAMES.index("dog")] = 20.0
    classes_QK[1, NAMES.index("cat")] = 20.0
    classes_QK[2, -1] = 20.0  # no object
    masks_Qhw = torch.full((3, 16, 16), -9.0)
    masks_Qhw[0, 4:8, 2:10] = 9.0
    masks_Qhw[1, 2:6, 8:12] = 1.0
    masks_Qhw[2] = 9.0
    found = {one.name: one for one in postprocess(classes_QK, masks_Qhw, (64, 64), (64, 48), (128, 96))}
    assert set(found) == {"dog", "cat"}
    assert found["dog"].box == pytest.approx((16, 32, 80, 64), abs=2)
    assert found["dog"].score > 0.95
    assert 0.5 < found["cat"].score < 0.75, "sigmoid(1) = 0.73 at most"


def test_a_query_without_pixels_gives_no_object() -> None:
    classes_QK = torch.zeros(1, len(NAMES) + 1)
    classes_QK[0, 0] = 20.0
    assert postprocess(classes_QK, torch.full((1, 8, 8), -1.0), (32, 32), (32, 32), (32, 32)) == []


def test_a_cutout_is_grey_around_the_object() -> None:
    image_CHW = torch.rand(3, 20, 30)
    mask_HW = torch.zeros(20, 30, dtype=torch.bool)
    mask_HW[5:10, 6:20] = True
    mask_HW[5, 6] = False
    crop_CHW = colors.cutout(
        image_CHW, SegmentedObject("dog", 0.9, detector.box_of(mask_HW), mask_HW=mask_HW)
    )
    assert crop_CHW.shape == (3, 5, 14)
    assert crop_CHW[:, 0, 0].tolist() == pytest.approx([0.6] * 3)
    assert torch.equal(crop_CHW[:, 1:], image_CHW[:, 6:10, 6:20])


def test_the_colour_is_the_nearest_of_the_ten(weights: Path) -> None:
    """Against the cosines worked out one prompt at a time by the CLIP score."""
    found = scorer.load(weights)
    reward = scorer.loading.load("clip", weights)
    image_CHW = torch.rand(3, 40, 40)
    dog = SegmentedObject("dog", 0.9, (4.0, 4.0, 30.0, 36.0))
    crop = image_CHW[None, :, 4:36, 4:30]
    texts = [t.format(color=c, name="dog") for c in COLORS for t in colors.TEMPLATES]
    with torch.no_grad():
        cosines_KT = reward.score(crop.expand(30, -1, -1, -1), texts).view(10, 3)
        tokens_BL = reward.tokenize(texts)  # type: ignore[attr-defined]
        lengths_K = reward.module.embed_texts(tokens_BL).view(10, 3, -1).mean(dim=1).norm(dim=-1)  # type: ignore[operator]
    expected = COLORS[int((cosines_KT.mean(dim=1) / lengths_K).argmax())]
    assert found.classifier.colors(image_CHW, [dog, dog]) == [expected] * 2


def test_the_scorer_runs_end_to_end_and_colours_only_what_is_asked(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask_HW = torch.zeros(64, 64, dtype=torch.bool)
    mask_HW[10:30, 10:30] = True
    dogs = [
        SegmentedObject("dog", score, detector.box_of(mask_HW), mask_HW=mask_HW)
        for score in (0.95, 0.93, 0.5)
    ]
    found = scorer.load(weights)
    found.evaluate(torch.rand(3, 64, 64), parse_prompt(RED_DOG))  # with the detections of random weights
    monkeypatch.setattr(detector, "detect", lambda network, image: dogs)
    evaluation, counted = found.evaluate(torch.rand(1, 64, 64), parse_prompt(RED_DOG))
    assert [one.color is not None for one in counted["dog"]] == [True, False, False]
    assert evaluation.correct is (counted["dog"][0].color == "red")
    evaluation, counted = found.evaluate(torch.rand(4, 64, 64), parse_prompt(TWO_DOGS))
    assert evaluation.correct
    assert len(counted["dog"]) == 2


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two prompts with two images each, in the official layout."""
    folder = tmp_path / "images"
    for number, row in enumerate((RED_DOG, TWO_DOGS)):
        (folder / f"{number:05}/samples").mkdir(parents=True)
        (folder / f"{number:05}/metadata.jsonl").write_text(json.dumps(row))
        for place in range(2):
            image = Image.new("RGB", (64, 48), "white")
            ImageDraw.Draw(image).ellipse((5, 5, 40, 40), fill=("red", "blue")[place])
            image.save(folder / f"{number:05}/samples/{place:04}.png")
        Image.new("RGB", (9, 9)).save(folder / f"{number:05}/grid.png")
    return folder


def test_the_command_writes_the_official_fields_and_resumes(
    images: Path, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(images), "--weights", str(weights), "--device", "cpu"]
    (images / "00001/samples/0001.png").write_bytes(b"no image")
    assert main(["geneval", *arguments]) == 0
    said = capsys.readouterr()
    assert "skipped 00001/samples/0001.png" in said.err
    assert "overall, mean of tasks" in said.out
    rows = [json.loads(line) for line in (images / "results.jsonl").read_text().splitlines()]
    assert [row["tag"] for row in rows] == ["colors", "colors", "counting"]
    fields = {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}
    assert all(set(row) == fields for row in rows)
    assert json.loads(rows[0]["metadata"]) == RED_DOG
    Image.new("RGB", (64, 48)).save(images / "00001/samples/0001.png")
    scored: list[str] = []
    monkeypatch.setattr(
        command, "decode", lambda place, name: scored.append(name) or command.BadImage(name, "x")
    )
    assert main(["geneval", *arguments]) == 0
    assert scored == ["00001/samples/0001.png"]


def test_the_table_of_an_evaluation_has_the_results_of_the_command(
    images: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def red_circles_are_two_dogs(network: Any, image_CHW: torch.Tensor) -> list[SegmentedObject]:
        mask_HW = image_CHW[2] < 0.5
        dog = SegmentedObject("dog", 0.95, detector.box_of(mask_HW | True), mask_HW=mask_HW)
        return [dog, dog] if bool(mask_HW.any()) else []

    monkeypatch.setattr(detector, "detect", red_circles_are_two_dogs)
    arguments = ["--weights", str(weights), "--rewards", "clip", "--cpu", "--out", str(tmp_path / "report")]
    assert evaluate.main(["--sets", f"base={images}", *arguments]) == 0
    assert main(["geneval", str(images), "--weights", str(weights), "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in (images / "results.jsonl").read_text().splitlines()]
    with (tmp_path / "report" / "images.csv").open(newline="") as stream:
        found = [(row["file"], bool(float(row["correct"]))) for row in csv.DictReader(stream)]
    assert found == [(str(Path(row["filename"]).relative_to(images)), row["correct"]) for row in rows]
    assert {correct for _, correct in found} == {True, False}


def test_the_metadata_of_a_folder_may_come_from_the_whole_file(images: Path, tmp_path: Path) -> None:
    whole = tmp_path / "evaluation_metadata.jsonl"
    whole.write_text("\n".join(map(json.dumps, (RED_DOG, TWO_DOGS))) + "\n")
    (images / "00001/metadata.jsonl").unlink()
    found = command.list_samples(images, whole)
    assert [row["tag"] for row in found.values()] == ["colors", "colors", "counting", "counting"]
    whole.write_text("\n".join(map(json.dumps, (TWO_DOGS, RED_DOG))) + "\n")
    with pytest.raises(HyperAlignError, match=r"is for 'a red dog', line 0 of --metadata .* for 'two dogs'"):
        command.list_samples(images, whole)
    with pytest.raises(HyperAlignError, match=r"no line 1 \(from 0\) of --metadata"):
        command.list_samples(images, None)


def test_bad_inputs_are_one_sentence(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([str(tmp_path / "none")], "There is no folder"),
        ([str(tmp_path)], "There are no images in"),
        ([str(images), "--weights", str(tmp_path)], "There is no model.safetensors"),
        ([str(images), "--device", "abacus"], "no device 'abacus'"),
        ([str(images), "--metadata", str(tmp_path / "none")], "cannot be read"),
    ):
        assert main(["geneval", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert not list(images.glob("*.jsonl"))
    assert not list(images.glob(".*"))
