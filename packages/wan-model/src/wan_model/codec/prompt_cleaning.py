"""Cleaning of prompts: one function for preparation and sampling, so that both embed the same string."""

import html
import re

from wan_model.extras import requires_extra

# Characters; a text encoder takes 512 tokens of it, and a tokenizer keeps some hundred bytes for each character.
LONGEST_PROMPT = 1_000_000

_WHITESPACE = re.compile(r"\s+")


def clean_prompt(prompt: str) -> str:
    """Fix the text encoding, unescape HTML twice, strip, and collapse white space.

    Source: ``prompt_clean`` of diffusers' ``WanPipeline`` and the official tokenizer's ``whitespace`` cleaning.

    Raises:
        ValueError: more than ``LONGEST_PROMPT`` characters.
    """
    if len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"a prompt has {len(prompt):,} characters; expected at most {LONGEST_PROMPT:,}")
    with requires_extra("sampling"):
        import ftfy

    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return _WHITESPACE.sub(" ", mended.strip()).strip()
