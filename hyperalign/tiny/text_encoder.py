"""The text encoder of the tiny model: from whole words to 16 context vectors of width 128."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import HyperAlignError
from .prompts import COLORS, COUNT_WORDS, NOUNS, plural

CONTEXT_LENGTH = 16
WIDTH = 128
PAD, START, END = 0, 1, 2
FUNCTION_WORDS = ("a", "an", "and", "of", "left", "right", "above", "below")
TEMPLATE_WORDS = ("picture", "emoji", "drawing", "icon")


def _vocabulary() -> tuple[str, ...]:
    words = [*FUNCTION_WORDS, *TEMPLATE_WORDS, *COUNT_WORDS.values(), *COLORS]
    for noun in NOUNS:
        words += [noun, plural(noun)]
    return ("<pad>", "<start>", "<end>", *dict.fromkeys(words))


VOCABULARY = _vocabulary()
_INDEX = {word: index for index, word in enumerate(VOCABULARY)}
NOUN_TOKENS = tuple(_INDEX[word] for noun in NOUNS for word in dict.fromkeys((noun, plural(noun))))


def word_ids(text: str) -> list[int]:
    """Returns the token of each word; commas and full stops are skipped.

    Raises:
        HyperAlignError: a word is not in the vocabulary.
    """
    words = re.findall(r"[^\s,.]+", text.lower())
    for word in words:
        if word not in _INDEX:
            close = difflib.get_close_matches(word, VOCABULARY, n=3, cutoff=0.6)
            hint = f"Did you mean {' or '.join(close)}? " if close else ""
            raise HyperAlignError(
                f"The prompt has the word {word!r}, which the tiny model does not know. {hint}"
                f"It knows {len(VOCABULARY) - 3} words; nouns are {', '.join(NOUNS)}; colours are "
                f"{', '.join(COLORS)}; counts are two to four; relations are left of, right of, above, below."
            )
    return [_INDEX[word] for word in words]


def text_of(tokens: Sequence[int]) -> str:
    """Returns the words of a chunk of tokens; tokenizing them gives the same tokens."""
    return " ".join(VOCABULARY[token] for token in tokens if token > END)


def tokenize(text: str) -> list[list[int]]:
    """Returns chunks of 16 tokens: start, up to 14 words, end, padding.

    Longer prompts give several chunks, as the host does for CLIP. Raises HyperAlignError on
    unknown words.
    """
    ids = word_ids(text)
    room = CONTEXT_LENGTH - 2
    chunks = [ids[i : i + room] for i in range(0, len(ids), room)] or [[]]
    return [[START, *chunk, END] + [PAD] * (room - len(chunk)) for chunk in chunks]


def tokenize_batch(texts: list[str]) -> Tensor:
    """Returns (B, 16) tokens of prompts that fit one chunk.

    Raises:
        HyperAlignError: a prompt has more than 14 words or an unknown one.
    """
    rows: list[list[int]] = []
    for text in texts:
        chunks = tokenize(text)
        if len(chunks) > 1:
            raise HyperAlignError(
                f"The prompt {text!r} has more than {CONTEXT_LENGTH - 2} words; shorten it, "
                "or encode its chunks one by one with tokenize()."
            )
        rows.append(chunks[0])
    return torch.tensor(rows, dtype=torch.long)


class TinyTextEncoder(nn.Module):
    """A two-layer transformer over word tokens, trained together with the base U-Net."""

    def __init__(self, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(len(VOCABULARY), WIDTH)
        # Words start at deviation 1. Positions that start far below it are never learned.
        self.position_embedding = nn.Parameter(torch.randn(CONTEXT_LENGTH, WIDTH) * 0.5)
        layer = nn.TransformerEncoderLayer(
            WIDTH, heads, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.final_norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Returns context (B, 16, 128) for tokens (B, 16)."""
        embedded = self.token_embedding(tokens_BL)
        x_BLC = embedded + self.position_embedding.to(embedded)
        return self.final_norm(self.transformer(x_BLC))
