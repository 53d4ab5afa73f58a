"""How open_clip's tokenizer cleans a prompt, on which the tokens of HPSv2 and HPSv2.1 depend."""

from __future__ import annotations

import html
import logging
import re
from functools import lru_cache

LOG = logging.getLogger(__name__)

MAY_NEED_REPAIR = re.compile(r"[^\t\n\r -~]|&#?\w{1,24};")
"""Found in every text that ftfy changes: a sign other than ASCII's, or an HTML entity."""


def open_clip_text(prompt: str) -> str:
    """Returns a prompt as open_clip reads it: repaired, HTML unescaped twice, single blanks, lower case.

    ftfy, which open_clip requires and no host does, repairs the text where it is installed. Without it a
    text that needs no repair comes out the same; the first one that may need it is reported in the log.
    """
    text = _unescaped(_repaired(prompt))
    return " ".join(text.split()).lower()


def _repaired(prompt: str) -> str:
    try:
        from ftfy import fix_text
    except ImportError:
        if MAY_NEED_REPAIR.search(_unescaped(prompt)):
            _report_missing_ftfy()
        return prompt
    return fix_text(prompt)


def _unescaped(text: str) -> str:
    return html.unescape(html.unescape(text))


@lru_cache(maxsize=1)
def _report_missing_ftfy() -> None:
    """Says once what differs without ftfy."""
    LOG.warning(
        "HPSv2 and HPSv2.1 were trained on prompts repaired by ftfy, which is not installed: curly quotes, "
        "ligatures, full-width letters, control characters and wrongly decoded text stay as they are, and "
        "prompts with them score slightly differently from the authors' code; others are not affected. For "
        "the authors' scores install ftfy (pip install ftfy) and start again. This is said once."
    )
