"""The build of the tiny model: its captions, the auxiliary task of its text encoder, and a whole build."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("resvg_py", reason="the build extra is not installed")

from hyperalign.tiny.prompts import COLORS, RELATIONS, Content, Group, caption, sample_content
from hyperalign.tiny.text_encoder import WIDTH, TinyTextEncoder, tokenize_batch
from hyperalign.tiny.weights import load_part
from train.tiny import base, evaluator_metrics, evaluators
from train.tiny.base import FACTS, fact_loss, noun_facts
from train.tiny.build import main
from train.tiny.scenes import CONFUSED_CAPTIONS, LOOK_ALIKES, confused_content

ART = Path(__file__).parents[2] / "build" / "tiny" / "art"
SHARE = 0.0007
PARTS = ("autoencoder", "text_encoder", "unet", "reward", "validation_reward", "detector", "style")
LEFT = Content("position", (Group("dog"), Group("cat")), "left of")
HEARTS = Content("counting", (Group("heart", "blue", 3),))


def test_facts_label_each_noun_of_a_prompt() -> None:
    none_colored, no_side = len(COLORS), len(RELATIONS)
    left, right = RELATIONS.index("left of"), RELATIONS.index("right of")
    assert noun_facts(LEFT) == [[0, none_colored, left], [0, none_colored, right]]
    assert noun_facts(HEARTS) == [[2, COLORS.index("blue"), no_side], [-100] * 3]


def test_reading_loss_is_nothing_for_the_truth_and_counts_every_noun() -> None:
    contents = [LEFT, HEARTS]
    tokens = tokenize_batch([caption(content) for content in contents])
    facts = torch.tensor([noun_facts(content) for content in contents])
    known = torch.zeros(*tokens.shape, sum(FACTS))
    # "<start> a dog left of a cat", "<start> three blue hearts"
    for row, place, labels in ((0, 2, facts[0, 0]), (0, 6, facts[0, 1]), (1, 3, facts[1, 0])):
        classes = labels + torch.tensor([0, FACTS[0], FACTS[0] + FACTS[1]])
        known[row, place, classes] = 20.0
    unknown = fact_loss(torch.zeros_like(known), tokens, facts)
    assert unknown.item() == pytest.approx(sum(math.log(count) for count in FACTS), abs=1e-4)
    assert fact_loss(known, tokens, facts) < 1e-4


def test_a_text_encoder_binds_colours_to_nouns_in_a_few_steps() -> None:
    torch.manual_seed(0)
    encoder, head = TinyTextEncoder(), nn.Linear(WIDTH, sum(FACTS))
    optimiser = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], 1e-3)
    for step in range(150):
        rng = random.Random(step)
        contents = [sample_content(rng) for _ in range(64)]
        tokens = tokenize_batch([caption(content) for content in contents])
        facts = torch.tensor([noun_facts(content) for content in contents])
        fact_loss(head(encoder(tokens)), tokens, facts).backward()
        optimiser.step()
        optimiser.zero_grad()
    vectors = encoder(tokenize_batch(["a red heart and a blue circle", "a blue heart and a red circle"]))
    assert F.cosine_similarity(vectors[0, 3], vectors[1, 3], dim=0) < 0.9


def test_confused_captions_swap_look_alikes_and_nothing_else() -> None:
    rng = random.Random(0)
    partner = {a: b for pair in LOOK_ALIKES for a, b in (pair, pair[::-1])}
    asked = Content("two_object", (Group("dog"), Group("robot")))
    claims = [confused_content(asked, rng) for _ in range(1000)]
    swapped = Content("two_object", (Group(partner["dog"]), Group("robot")))
    assert set(claims) == {asked, swapped}
    assert claims.count(swapped) / 1000 == pytest.approx(CONFUSED_CAPTIONS, abs=0.05)


def test_the_whole_model_builds_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "BATCH", 8)
    monkeypatch.setattr(evaluators, "GROUPS", 4)
    monkeypatch.setattr(evaluators, "BATCH", 16)
    for count in ("IMAGES", "PER_FAMILY", "TUNING_PER_FAMILY"):
        monkeypatch.setattr(evaluator_metrics, count, 12)
    if ART.exists():
        shutil.copytree(ART, tmp_path / "out" / "art")
    weights = tmp_path / "weights"
    main(["--out", str(tmp_path / "out"), "--weights", str(weights), "--share", str(SHARE)])
    assert {path.stem for path in weights.glob("*.safetensors")} == set(PARTS)
    for part in PARTS:
        built, header = load_part(part, weights)
        committed, _ = load_part(part)
        assert {k: v.shape for k, v in built.items()} == {k: v.shape for k, v in committed.items()}
        assert header["share"] == SHARE
