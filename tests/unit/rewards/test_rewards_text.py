"""Prompts on their way into a reward: checks, tokens by hand, and what is remembered."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.rewards.text import (
    BERT,
    CLIP,
    HashTokenizer,
    PromptCache,
    Vocabulary,
    check_characters,
    check_prompts,
    page,
)

CPU = torch.device("cpu")


def test_a_file_s_page_is_its_repository() -> None:
    for kind in ("resolve", "raw"):
        assert page(f"https://host.co/a/b/{kind}/main/file.bin") == "host.co/a/b"
    assert page("https://host.co/a/b") == "host.co/a/b"


def test_one_text_for_each_image_is_taken() -> None:
    check_prompts(["a", "b"], 2)
    check_prompts((), 0)
    check_characters("whole \U0001f600")


@pytest.mark.parametrize(
    ("prompts", "images", "said"),
    [("ab", 2, "one string"), (["a"], 2, "2 images and 1"), (["a", "b"], 1, "1 images and 2"),
     (["a", 3], 2, "the prompt 3"), (["a", "b\ud83d"], 2, "half a character"), (["\udfff"], 1, "half"),
     (["\ud800"], 1, "half")],
)  # fmt: skip
def test_other_prompts_are_refused(prompts, images: int, said: str) -> None:
    with pytest.raises(HyperAlignError, match=said):
        check_prompts(prompts, images)


def write_clip(folder: Path) -> None:
    """A byte-pair vocabulary of a few letters, whole words and two merges; `Ġ` is a blank."""
    words = ["<|startoftext|>", "<|endoftext|>", "a", "b", "c", "a</w>", "b</w>", "c</w>", "ab", "ab</w>",
             "1</w>", "!</w>", "'s</w>", "'", "s</w>"]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\na b</w>\n' s</w>\n")


def test_clip_s_tokens_by_hand(tmp_path: Path) -> None:
    """Lower case, white space apart, words cut at digits, signs and 's; the rest of 77 is zeros."""
    write_clip(tmp_path)
    found = CLIP.load(tmp_path)(["AB  abc\n1 11!", "", "ab's"])
    assert found.shape == (3, 77)
    rows = [[0, 9, 8, 7, 10, 10, 10, 11, 1], [0, 1], [0, 9, 12, 1]]
    assert found.tolist() == [row + [0] * (77 - len(row)) for row in rows]


def test_clip_keeps_75_tokens_between_start_and_end(tmp_path: Path) -> None:
    write_clip(tmp_path)
    tokenize = CLIP.load(tmp_path)
    assert tokenize(["a " * 75]).tolist() == tokenize(["a " * 76]).tolist() == [[0, *[5] * 75, 1]]


def test_a_composed_letter_is_one_letter(tmp_path: Path) -> None:
    write_clip(tmp_path)
    tokenize = CLIP.load(tmp_path)
    assert torch.equal(tokenize(["e\u0301"]), tokenize(["\u00e9"]))


def write_bert(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "##s", "a"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


def test_bert_s_tokens_by_hand(tmp_path: Path) -> None:
    write_bert(tmp_path)
    found = BERT.load(tmp_path)(["A Dogs", "cat", "a " * 40])
    assert found.shape == (3, 35)
    assert found[0].tolist() == [2, 7, 5, 6, 3] + [0] * 30
    assert found[1].tolist() == [2, 1, 3] + [0] * 32
    assert found[2].tolist() == [2, *[7] * 33, 3]


def test_a_tokenizer_is_looked_for_in_its_own_folder_then_beside_the_weights(tmp_path: Path) -> None:
    places: list[Path] = []

    def read(place: Path):
        places.append(place)
        return lambda prompts: torch.zeros(len(prompts), 1)

    vocabulary = Vocabulary(("one", "two"), "https://x/resolve/y", read, HashTokenizer(4, 1, 2, range(3, 9)))
    given, weights = tmp_path / "given", tmp_path / "weights"
    with pytest.raises(HyperAlignError, match="one and two"):
        vocabulary.load(weights, given)
    for place in (weights, weights / "tokenizer", given):
        place.mkdir(parents=True, exist_ok=True)
        (place / "one").touch()
        with (
            pytest.raises(HyperAlignError, match="one and two")
            if not places
            else pytest.raises(StopIteration)
        ):
            vocabulary.load(weights, given)
            raise StopIteration
        (place / "two").touch()
        vocabulary.load(weights, given)
        assert places[-1] == place
    vocabulary.load(weights)
    assert places[-1] == weights / "tokenizer"


@pytest.mark.parametrize("vocabulary", [CLIP, BERT])
def test_a_tokenizer_is_built_once_until_its_files_change(tmp_path: Path, vocabulary: Vocabulary) -> None:
    write_clip(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    first = vocabulary.load(tmp_path)
    assert vocabulary.load(tmp_path) is first
    for name in vocabulary.file_names:
        before = vocabulary.load(tmp_path)
        os.utime(tmp_path / name, (1, 1))
        assert vocabulary.load(tmp_path) is not before


def test_damaged_tokenizer_files_are_refused(tmp_path: Path) -> None:
    write_clip(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(HyperAlignError, match="cannot be read"):
        CLIP.load(tmp_path)
    for missing in ("<|startoftext|>", "<|endoftext|>"):
        write_clip(tmp_path)
        words = json.loads((tmp_path / "vocab.json").read_text())
        del words[missing]
        (tmp_path / "vocab.json").write_text(json.dumps(words))
        with pytest.raises(HyperAlignError, match="cannot be read"):
            CLIP.load(tmp_path)

    def silent(_: Path):
        def tokenize(_: object) -> Tensor:
            raise RuntimeError("broken inside")

        return tokenize

    with pytest.raises(HyperAlignError, match="broken inside"):
        Vocabulary((), "https://x", silent, HashTokenizer(4, 1, 2, range(3, 9))).load(tmp_path)


def test_a_word_s_checksum_picks_its_token() -> None:
    tokenize = HashTokenizer(5, 90, 91, range(10, 17))
    one, two, three = (10 + zlib.crc32(word) % 7 for word in (b"one", b"two", b"three"))
    assert tokenize(["One  two", "", "one two three four"]).tolist() == [
        [90, one, two, 91, 0], [90, 91, 0, 0, 0], [90, one, two, three, 91]
    ]  # fmt: skip


def test_tokens_without_files_look_like_those_with() -> None:
    clip, bert = CLIP.hash_tokenizer(["a b"]), BERT.hash_tokenizer(["a b"])
    assert (clip.shape, bert.shape) == ((1, 77), (1, 35))
    assert (clip[0, 0], clip[0, 3], bert[0, 0], bert[0, 3]) == (49406, 49407, 101, 102)
    assert CLIP.hash_tokenizer.words == range(1, 49406)  # pyright: ignore[reportFunctionMemberAccess]
    assert BERT.hash_tokenizer.words == range(1996, 30522)  # pyright: ignore[reportFunctionMemberAccess]
    assert (CLIP.file_names, BERT.file_names) == (("vocab.json", "merges.txt"), ("vocab.txt",))


class Encoder:
    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.weight = torch.ones(1, requires_grad=True)

    def __call__(self, prompts: list[str]) -> Tensor:
        self.asked.append(prompts)
        return torch.tensor([[float(len(prompt)), 1.0] for prompt in prompts]) * self.weight


def test_each_prompt_is_encoded_once() -> None:
    cache, encode = PromptCache(), Encoder()
    assert cache.features(["aa", "b", "aa"], encode, CPU).tolist() == [[2, 1], [1, 1], [2, 1]]
    assert cache.features(["ccc", "b"], encode, CPU).tolist() == [[3, 1], [1, 1]]
    assert cache.features(["ccc"], encode, CPU).tolist() == [[3, 1]]
    assert encode.asked == [["aa", "b"], ["ccc"]]


def test_the_prompts_used_longest_ago_are_forgotten() -> None:
    cache, encode = PromptCache(2), Encoder()
    cache.features(["a", "b"], encode, CPU)
    cache.features(["a"], encode, CPU)
    cache.features(["c"], encode, CPU)
    cache.features(["a", "c"], encode, CPU)
    assert encode.asked == [["a", "b"], ["c"]]
    cache.features(["b"], encode, CPU)
    assert encode.asked[2:] == [["b"]]
    assert len(cache.features(["a", "b", "c", "d"], encode, CPU)) == 4


def test_1024_prompts_are_remembered() -> None:
    cache, encode = PromptCache(), Encoder()
    prompts = [str(number) for number in range(1024)]
    for _ in range(2):
        cache.features(prompts, encode, CPU)
    assert len(encode.asked) == 1
    cache.features(["new"], encode, CPU)
    cache.features(["0"], encode, CPU)
    assert len(encode.asked) == 3


def test_features_have_no_gradient_and_serve_a_later_one() -> None:
    cache, encode = PromptCache(), Encoder()
    with torch.inference_mode():
        cache.features(["a"], encode, CPU)
    features = cache.features(["a"], encode, CPU)
    assert not features.requires_grad and not features.is_inference()
    weight = torch.ones(2, requires_grad=True)
    (features * weight).sum().backward()
    assert weight.grad is not None


def test_a_remembered_row_does_not_hold_the_whole_batch() -> None:
    whole = torch.ones(3, 2)
    cache = PromptCache()
    cache.features(["a", "b", "c"], lambda _: whole, CPU)
    whole.zero_()
    assert cache.features(["b"], Encoder(), CPU).tolist() == [[1, 1]]
