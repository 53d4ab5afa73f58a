"""The sources of a hypernetwork are stated in its header and on its card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hyperalign import checkpoint, provenance
from hyperalign.card import card, card_path, write_card
from hyperalign.checkpoint import HEADER_KEY, read_header
from hyperalign.cli.main import main
from hyperalign.errors import HyperAlignError
from hyperalign.provenance import Source, dataset_sources, reward_source, sources
from hyperalign.rewards.loading import NAMES
from hyperalign.tiny.weights import HYPERNETWORKS
from scripts.convert_headers import converted

yaml = pytest.importorskip("yaml")

FLUX = sources(
    "flux", {"hpsv2.1": 1.0, "clip": 0.5, "mine": 2.0, "unused": 0.0}, "Pick-a-Pic v2, preference images"
)


@pytest.fixture
def header(make_hyperalign: Any) -> checkpoint.Header:
    training = {
        "steps": 300, "unsafe": "7 of 10 images left out as unsafe (nsfw > 0.2)",
        "recipe": {"objective": {"rewards": {"hpsv2.1": 1.0}}, "data": {}},
        "metrics": {"hpsv2.1": 0.31234, "pickscore": 21.5, "diversity": 0.4},
    }  # fmt: skip
    return dataclasses.replace(make_hyperalign().header, training=training, sources=FLUX)


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_every_reward_has_its_facts() -> None:
    assert provenance.REWARDS.keys() == set(NAMES)
    for facts in (*provenance.REWARDS.values(), *provenance.DATASETS.values(), *provenance.BASES.values()):
        assert facts.licence and facts.biases


def test_sources_name_rewards_with_weights_and_exclude_unused_ones() -> None:
    assert [source.title for source in FLUX] == [
        "FLUX.1 [dev]", "HPSv2.1", "0.5 x CLIP score (ViT-L/14)", "2 x mine", "Pick-a-Pic v2",
    ]  # fmt: skip


def test_an_unknown_source_is_taken_for_the_users_own() -> None:
    assert reward_source("mine", 1.0) == Source("reward", "mine", provenance.UNKNOWN_LICENCE, weight=1.0)
    (mine,) = dataset_sources("holiday images, CC0")
    assert (mine.name, mine.page, mine.biases) == ("holiday images, CC0", "", "")
    assert dataset_sources("none") == []


@pytest.mark.parametrize("text", ["Pick-a-Pic v2", "pickapic_v2 train split", "data/PickAPic-v2, SFW part"])
def test_a_dataset_is_known_however_it_is_spelled(text: str) -> None:
    assert dataset_sources(text) == [provenance.DATASETS["pickapicv2"]]


def test_another_version_is_not_taken_for_the_known_one() -> None:
    assert dataset_sources("HPDv3")[0].name == "HPDv3"


def test_a_base_model_of_the_hub_is_not_taken_for_its_familys_usual_one() -> None:
    schnell = provenance.base_source("flux", "black-forest-labs/FLUX.1-schnell")
    assert schnell.page == "https://huggingface.co/black-forest-labs/FLUX.1-schnell"
    assert schnell.licence != provenance.BASES["flux"].licence
    assert provenance.base_source("flux", "black-forest-labs/FLUX.1-dev") == provenance.BASES["flux"]


def test_sources_go_through_the_file(make_hyperalign: Any, header: checkpoint.Header, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    checkpoint.save(path, make_hyperalign().network, header)
    assert read_header(path).sources == FLUX


@pytest.mark.parametrize(
    "source", [{"kind": "reward"}, {"kind": "x", "name": "a", "licence": "b"}, "a", {"weight": "1"}]
)
def test_a_header_with_broken_sources_is_refused(
    make_hyperalign: Any, header: checkpoint.Header, tmp_path: Path, source: Any
) -> None:
    path = tmp_path / "one.safetensors"
    hyperalign = make_hyperalign()
    raw = dataclasses.asdict(header) | {"sources": [source]}
    tensors = {name: value.clone() for name, value in hyperalign.network.state_dict().items()}
    checkpoint.save_atomically(tensors, path, {HEADER_KEY: json.dumps(raw)})
    with pytest.raises(HyperAlignError, match="header of one.safetensors cannot be read"):
        read_header(path)


def test_the_card_states_sources_metrics_and_risks(header: checkpoint.Header) -> None:
    text = card(header, "mine")
    assert front_matter(text) == {
        "license": "other",
        "license_name": "FLUX.1 [dev] Non-Commercial License",
        "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev",
        "base_model": "black-forest-labs/FLUX.1-dev",
        "base_model_relation": "adapter",
        "datasets": ["yuvalkirstain/pickapic_v2"],
        "pipeline_tag": "text-to-image",
        "tags": ["hyperalign", "hypernetwork", "alignment", "arxiv:2601.15968"],
    }
    for fact in (
        "# mine", "2604.13305", "| hpsv2.1 (optimised) | 0.3123 |", "| pickscore | 21.5 |", "2 x mine",
        "7 of 10 images left out as unsafe (nsfw > 0.2)", "**Misuse.**", "hyperalign audit",
    ):  # fmt: skip
        assert fact in text


@pytest.mark.parametrize(
    "training",
    [
        {"metrics": [0.5]},
        {"metrics": {"reward": 10**400, "other": float("nan")}},
        {"metrics": {"reward": 0.5}, "recipe": "mine"},
        {"conditioning": {"shares": {"prompt": 10**400}}},
    ],
)
def test_a_card_of_any_training_facts_is_made(header: checkpoint.Header, training: dict[str, Any]) -> None:
    assert "## Metrics" in card(dataclasses.replace(header, training=training), "mine")


def test_the_card_of_a_file_without_sources_says_so(header: checkpoint.Header) -> None:
    text = card(dataclasses.replace(header, training={}, sources=()), "mine")
    assert "Not recorded in the file." in text
    assert "None recorded" in text
    assert "license" not in front_matter(text)


@pytest.mark.parametrize("name", ["tiny_s", "tiny_p", "tiny_i", "tiny_static"])
def test_the_committed_files_have_cards(name: str) -> None:
    text = card(read_header(HYPERNETWORKS / f"{name}.safetensors"), name)
    assert front_matter(text)["license"] == "apache-2.0"
    assert "EmojiScenes" in text


def test_the_command_prints_the_card_or_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = HYPERNETWORKS / "tiny_s.safetensors", tmp_path / "README.md"
    expected = card(read_header(path), "tiny_s")
    assert main(["card", str(path)]) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert main(["card", str(path), "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == expected
    assert "Wrote" in capsys.readouterr().out


def test_converting_a_header_keeps_the_bytes_of_every_tensor() -> None:
    content = (HYPERNETWORKS / "tiny_s.safetensors").read_bytes()
    older = content.replace(b"preference dataset", b"preference data")
    older = (int.from_bytes(content[:8], "little") - len(content) + len(older)).to_bytes(8, "little") + older[
        8:
    ]
    assert older != content
    assert converted(older) == converted(content) == content


def test_an_interrupted_card_leaves_the_old_one(
    header: checkpoint.Header, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_card(tmp_path / "mine.safetensors", header)
    assert path == card_path(tmp_path / "mine.safetensors") == tmp_path / "mine.md"
    before = path.read_bytes()

    def interrupted(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_card(tmp_path / "mine.safetensors", dataclasses.replace(header, training={}))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_reports_an_error_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["card", str(tmp_path / "gone.safetensors")]) == 2
    assert capsys.readouterr().err.startswith("error: There is no file")


@pytest.mark.parametrize("path", sorted(HYPERNETWORKS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_a_committed_hypernetwork_names_its_sources_and_has_its_card(path: Path) -> None:
    header = read_header(path)
    assert {source.kind for source in header.sources} == {"base model", "reward", "preference dataset"}
    assert card_path(path).read_text(encoding="utf-8") == card(header, path.stem)
