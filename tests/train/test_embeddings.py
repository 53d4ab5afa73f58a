"""The cache of prompt embeddings: computed once, read from disk, at paddings that vary."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from in_processes import in_processes

from hyperalign.errors import HyperAlignError
from train.data.embeddings import PROMPTS_PER_FILE, CachedPromptEncoder, EmbeddingCache
from train.models.base import Conditions

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


class Encoder:
    """A text encoder whose vectors depend on prompt and padding; it records its prompts."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, prompts: Sequence[str], length: int) -> Conditions:
        self.seen += prompts
        values = torch.tensor([float(len(prompt)) for prompt in prompts])
        return {
            "prompt_embeds": values[:, None, None].expand(-1, length, 4).half(),
            "pooled_prompt_embeds": values[:, None].expand(-1, 2).half(),
        }


def prompts(count: int) -> list[str]:
    return ["x" * index for index in range(count)]


def test_conditions_come_back_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    texts = CachedPromptEncoder(tmp_path, (8,), CPU)
    texts.fill(prompts(2 * PROMPTS_PER_FILE + 3), Encoder())
    found = CachedPromptEncoder(tmp_path, (8,), CPU).conditions(["xxx", "", "x" * PROMPTS_PER_FILE, "xxx"])
    assert found["prompt_embeds"].shape == (4, 8, 4)
    assert found["prompt_embeds"][:, 0, 0].tolist() == [3, 0, PROMPTS_PER_FILE, 3]
    assert found["pooled_prompt_embeds"][:, 1].tolist() == [3, 0, PROMPTS_PER_FILE, 3]


def test_only_new_prompts_are_encoded(tmp_path: Path) -> None:
    CachedPromptEncoder(tmp_path, (8,), CPU).fill(prompts(5), Encoder())
    encoder = Encoder()
    texts = CachedPromptEncoder(tmp_path, (8,), CPU)
    assert texts.count_missing(prompts(7)) == [2]
    texts.fill(prompts(7), encoder)
    assert encoder.seen == prompts(7)[5:]


def test_processes_share_the_work(tmp_path: Path) -> None:
    encoders = [Encoder(), Encoder()]
    for rank, encoder in enumerate(encoders):
        CachedPromptEncoder(tmp_path / str(rank), (8,), CPU).fill(prompts(9), encoder, rank, 2)
    assert sorted([*encoders[0].seen, *encoders[1].seen]) == sorted(prompts(9))


def test_no_prompt_is_skipped_when_processes_start_at_different_times(tmp_path: Path) -> None:
    for rank in range(3):  # each opens the folder after those before it
        CachedPromptEncoder(tmp_path, (8, 4), CPU).fill(prompts(10), Encoder(), rank, 3)
    assert CachedPromptEncoder(tmp_path, (8, 4), CPU).count_missing(prompts(10)) == [0, 0]


def test_paddings_vary_over_batches_and_not_over_runs(tmp_path: Path) -> None:
    texts = CachedPromptEncoder(tmp_path, (4, 8), CPU)
    texts.fill(prompts(20), Encoder())
    batches = [prompts(20)[index : index + 2] for index in range(18)]
    lengths = [texts.conditions(batch)["prompt_embeds"].shape[1] for batch in batches]
    again = CachedPromptEncoder(tmp_path, (4, 8), CPU)
    assert set(lengths) == {4, 8}
    assert lengths == [again.conditions(batch)["prompt_embeds"].shape[1] for batch in batches]


def test_the_prompts_of_a_damaged_file_are_encoded_again(tmp_path: Path) -> None:
    CachedPromptEncoder(tmp_path, (8,), CPU).fill(prompts(3), Encoder())
    path = next((tmp_path / "8").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:20])
    encoders = [Encoder(), Encoder()]
    views = [CachedPromptEncoder(tmp_path, (8,), CPU) for _ in encoders]  # of two processes, at the same time
    for rank, (view, encoder) in enumerate(zip(views, encoders, strict=True)):
        view.fill(prompts(3), encoder, rank, 2)
    assert sorted([*encoders[0].seen, *encoders[1].seen]) == prompts(3)
    assert CachedPromptEncoder(tmp_path, (8,), CPU).count_missing(prompts(3)) == [0]
    assert path.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are POSIX")
def test_a_full_disk_is_one_sentence_and_written_embeddings_stay(tmp_path: Path) -> None:
    import full_disk

    (done,) = in_processes(1, tmp_path, full_disk.embeddings, tmp_path / "8")
    assert done.status == 0, done.errors
    assert "cannot be written" in done.output
    assert "GiB are free there. Make room, or set data.embeddings to another disk" in done.output
    assert EmbeddingCache(tmp_path / "8").missing(["a", "b"]) == ["b"]
    assert len(list((tmp_path / "8").iterdir())) == 1


def test_an_unknown_prompt_is_named(tmp_path: Path) -> None:
    with pytest.raises(HyperAlignError, match="lack the prompt 'a cat'"):
        CachedPromptEncoder(tmp_path, (8,), CPU).conditions(["a cat"])


@given(texts=st.lists(st.text(max_size=20), min_size=1, max_size=8))
def test_any_text_can_be_cached(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = EmbeddingCache(tmp_path_factory.mktemp("cache"))
    missing = cache.missing(texts)
    cache.add(missing, Encoder()(missing, 2))
    assert cache.read(texts)["pooled_prompt_embeds"][:, 0].tolist() == [len(text) for text in texts]
