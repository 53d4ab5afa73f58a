"""Prompts of reward models: checks, tokenizers, and a cache of text features."""

from __future__ import annotations

import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import HyperAlignError
from .cleaning import open_clip_text

Tokenizer = Callable[[Sequence[str]], Tensor]
"""Prompts -> token ids (B, L)."""

CLIP_LENGTH = 77
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
OPEN_CLIP_START, OPEN_CLIP_END = "<start_of_text>", "<end_of_text>"
"""The same two tokens as a prompt spells them for open_clip."""
CLIP_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""The words of openai/CLIP, as a regular expression."""
OPEN_CLIP_WORD = f"(?i){CLIP_WORD}"
"""Those of open_clip: after lower-casing this still concerns the long s (U+017F)."""
BERT_LENGTH = 35
BERT_PAD = 0
BLIP_TOKENS = ["[DEC]", "[ENC]"]
"""What BLIP adds to BERT's vocabulary, after its last word."""
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""One half of a surrogate pair without the other, as from an emoji that was cut in two."""


def page(url: str) -> str:
    """Returns the page of the repository that contains a published file."""
    return re.split("/resolve/|/raw/", url)[0].removeprefix("https://")


def check_prompts(prompts: Sequence[object], images: int) -> None:
    """Raises HyperAlignError unless there is one prompt, a string, for each image."""
    if isinstance(prompts, str):
        raise HyperAlignError(
            f"Found one string {prompts!r}; expected a list with one prompt per image. Repeat it in a list."
        )
    if len(prompts) != images:
        raise HyperAlignError(
            f"Found {images} images and {len(prompts)} prompts; expected one prompt per image. "
            "Repeat the prompt for every image."
        )
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise HyperAlignError(f"Found the prompt {prompt!r}; expected text. Convert it to a string.")
        check_characters(prompt)


def check_characters(prompt: str, owner: str = "") -> None:
    """Raises HyperAlignError on half a character, which no tokenizer accepts; `owner` follows the prompt."""
    if half := HALF_CHARACTER.search(prompt):
        raise HyperAlignError(
            f"Found half a character ({half[0]!r}) in the prompt {prompt!r}{owner}; expected whole ones. An "
            "emoji was cut in two there: type it again, or remove it."
        )


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The files of a tokenizer, and their source."""

    file_names: tuple[str, ...]
    url: str
    """The address of the folder in which all of them are published."""
    build: Callable[[Path], Tokenizer]
    """Makes the tokenizer from a folder with the files."""
    hash_tokenizer: Tokenizer
    """Tokens without the files, for networks with random weights."""

    def load(self, folder: Path, tokenizer_folder: Path | None = None) -> Tokenizer:
        """Returns the tokenizer of the first folder that has all files.

        The folders are `tokenizer_folder`, `folder/tokenizer` and `folder`.

        Raises HyperAlignError: none of them has the files, or they are damaged.
        """
        folders = [folder / "tokenizer", folder]
        if tokenizer_folder is not None:
            folders.insert(0, tokenizer_folder)
        for found in folders:
            if all((found / name).is_file() for name in self.file_names):
                return self._build_checked(found)
        raise HyperAlignError(
            f"The tokenizer's {' and '.join(self.file_names)} (below 2 MB) are in none of "
            f"{', '.join(map(str, folders))}; get them from {page(self.url)} and put them into "
            f"{folder / 'tokenizer'}."
        )

    def _build_checked(self, folder: Path) -> Tokenizer:
        try:
            tokenize = self.build(folder)
            tokenize(["an image"])
        except Exception as error:
            raise HyperAlignError(
                f"The tokenizer files in {folder} cannot be read ({error}). Get "
                f"{' and '.join(self.file_names)} again from {page(self.url)}."
            ) from error
        return tokenize


def _clip_tokenizer(folder: Path) -> Tokenizer:
    """Builds CLIP's tokenizer of transformers, which itself would read other files of the folder, too."""
    from tokenizers import Regex, normalizers

    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    clean = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    return _byte_pairs(folder, (CLIP_START, CLIP_END), CLIP_WORD, clean)


def _open_clip_tokenizer(folder: Path) -> Tokenizer:
    """Builds open_clip's tokenizer from the files of transformers'."""
    tokenize = _byte_pairs(folder, (OPEN_CLIP_START, OPEN_CLIP_END), OPEN_CLIP_WORD)
    return lambda prompts: tokenize([open_clip_text(prompt) for prompt in prompts])


def _byte_pairs(folder: Path, ends: tuple[str, str], word: str, normalizer: Any = None) -> Tokenizer:
    """Builds CLIP's byte-pair encoding; `ends` is how a prompt spells the start and the end token."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers.models import BPE

    vocabulary, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    for published, spelt in zip((CLIP_START, CLIP_END), ends, strict=True):
        if published not in vocabulary:
            raise ValueError(f"vocab.json has no {published}")
        vocabulary[spelt] = vocabulary.pop(published)
    start, end = (vocabulary[spelt] for spelt in ends)
    encoder: Any = Tokenizer(BPE(vocabulary, merges, unk_token=ends[1], end_of_word_suffix="</w>"))
    encoder.add_special_tokens(list(ends))
    if normalizer is not None:
        encoder.normalizer = normalizer
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(word), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    encoder.enable_truncation(CLIP_LENGTH - 2)

    def tokenize(prompts: Sequence[str]) -> Tensor:
        encodings = encoder.encode_batch(list(prompts))
        return torch.tensor([_padded(start, encoding.ids, end, CLIP_LENGTH) for encoding in encodings])

    return tokenize


def _bert_tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import BertWordPieceTokenizer

    tokenizer: Any = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
    tokenizer.add_special_tokens(BLIP_TOKENS)
    tokenizer.enable_truncation(BERT_LENGTH)
    tokenizer.enable_padding(length=BERT_LENGTH, pad_id=BERT_PAD)

    def tokenize(prompts: Sequence[str]) -> Tensor:
        return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(prompts))])

    return tokenize


def bert_attention_mask(tokens_BL: Tensor) -> Tensor:
    """Returns 1 for every token up to the last, 0 for the padding; a prompt may itself spell [PAD]."""
    return (tokens_BL != BERT_PAD).long().flip(1).cummax(1).values.flip(1)


def _padded(start: int, ids: list[int], end: int, length: int) -> list[int]:
    """Returns start, ids, end, and zeros up to a length; the networks ignore what follows the end."""
    return [start, *ids, end] + [0] * (length - 2 - len(ids))


@dataclass(frozen=True, slots=True)
class HashTokenizer:
    """Tokens without a vocabulary: checksums of words, for benchmarks and smoke runs."""

    length: int
    start: int
    end: int
    words: range

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Returns ids (B, length), padded with 0; longer prompts are truncated."""
        return torch.tensor([self._row(prompt) for prompt in prompts])

    def _row(self, prompt: str) -> list[int]:
        checksums = [zlib.crc32(word.encode()) for word in prompt.lower().split()[: self.length - 2]]
        ids = [self.words[checksum % len(self.words)] for checksum in checksums]
        return _padded(self.start, ids, self.end, self.length)


def _kept(build: Callable[[Path], Tokenizer], *file_names: str) -> Callable[[Path], Tokenizer]:
    """Returns `build` with its results kept until the files change: a host asks before every run."""

    @lru_cache(maxsize=4)
    def built(folder: Path, _states: tuple[tuple[int, int], ...]) -> Tokenizer:
        return build(folder)

    def current(folder: Path) -> Tokenizer:
        found = [(folder / name).stat() for name in file_names]
        return built(folder, tuple((one.st_mtime_ns, one.st_size) for one in found))

    return current


CLIP = Vocabulary(
    ("vocab.json", "merges.txt"),
    "https://huggingface.co/openai/clip-vit-large-patch14/resolve/main",
    _kept(_clip_tokenizer, "vocab.json", "merges.txt"),
    HashTokenizer(CLIP_LENGTH, 49406, 49407, range(1, 49406)),
)
"""The byte-pair vocabulary of every CLIP, with transformers' tokens; ComfyUI ships it too."""

OPEN_CLIP = replace(CLIP, build=_kept(_open_clip_tokenizer, "vocab.json", "merges.txt"))
"""The same vocabulary with open_clip's tokens."""

BERT = Vocabulary(
    ("vocab.txt",),
    "https://huggingface.co/google-bert/bert-base-uncased/resolve/main",
    _kept(_bert_tokenizer, "vocab.txt"),
    HashTokenizer(BERT_LENGTH, 101, 102, range(1996, 30522)),
)


class PromptCache:
    """Text features of recent prompts: computed once, without gradient, and kept on the device in use."""

    def __init__(self, size: int = 1024) -> None:
        self._size = size
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def features(
        self, prompts: Sequence[str], encode: Callable[[list[str]], Tensor], device: torch.device
    ) -> Tensor:
        """Returns features (B, D) of the prompts on `device`; `encode` computes those that are not cached."""
        # A host may run in inference mode, whose tensors cannot be part of a gradient later.
        with torch.inference_mode(False), torch.no_grad():
            missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._features]
            if missing:
                rows = (row.clone() for row in encode(missing))
                self._features.update(zip(missing, rows, strict=True))
            for prompt in prompts:
                self._features[prompt] = self._features[prompt].to(device)
                self._features.move_to_end(prompt)
            features_BD = torch.stack([self._features[prompt] for prompt in prompts])
        while len(self._features) > self._size:
            self._features.popitem(last=False)
        return features_BD
