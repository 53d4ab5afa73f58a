"""Prompts of reward models: checks, tokenizers, and a cache of text features."""

from __future__ import annotations

import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import HyperAlignError

Tokenizer = Callable[[Sequence[str]], Tensor]
"""Prompts -> token ids (B, L)."""

CLIP_LENGTH = 77
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""The words of openai/CLIP, as a regular expression."""
BERT_LENGTH = 35
BERT_PAD = 0
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
    """Builds CLIP's byte-pair encoding from two files; transformers would read others of the folder, too."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    encoder: Any = Tokenizer(BPE.from_file(*files, unk_token=CLIP_END, end_of_word_suffix="</w>"))
    encoder.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORD), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    encoder.enable_truncation(CLIP_LENGTH - 2)
    start, end = encoder.token_to_id(CLIP_START), encoder.token_to_id(CLIP_END)
    if start is None or end is None:
        raise ValueError(f"vocab.json has no {CLIP_START} and {CLIP_END}")

    def tokenize(prompts: Sequence[str]) -> Tensor:
        encodings = encoder.encode_batch(list(prompts))
        return torch.tensor([_padded(start, encoding.ids, end, CLIP_LENGTH) for encoding in encodings])

    return tokenize


def _bert_tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import BertWordPieceTokenizer

    tokenizer: Any = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
    tokenizer.enable_truncation(BERT_LENGTH)
    tokenizer.enable_padding(length=BERT_LENGTH, pad_id=BERT_PAD)

    def tokenize(prompts: Sequence[str]) -> Tensor:
        return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(prompts))])

    return tokenize


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
"""The byte-pair vocabulary of every CLIP; ComfyUI ships it too."""

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
