"""The tokenizer of prompts: a ``tokenizer.json`` of the tokenizers library, with the parts that text encoders use."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wan_model.extras import requires_extra
from wan_model.weights.model_folder import read_json

# Others, and other patterns, can take forever on a short text or multiply it.
_PARTS = {
    *("Sequence", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Strip", "Lowercase", "Replace", "Prepend", "Precompiled"),
    *("Metaspace", "Whitespace", "WhitespaceSplit", "Digits", "Punctuation", "ByteLevel", "ByteFallback", "Fuse"),
    *("TemplateProcessing", "Unigram", "BPE", "WordPiece", "WordLevel"),
}
_PATTERNS = {" {2,}", r"\s+", r" +", r"\n", r"\t"}
_LONGEST_REPLACEMENT = 8


class PromptTokenizer:
    """The tokenizer of a ``tokenizer`` folder.

    Args:
        folder: with ``tokenizer.json``.

    Raises:
        ValueError: it is missing or damaged, or has parts that no text encoder of Wan has.
    """

    def __init__(self, folder: Path) -> None:
        with requires_extra("sampling"):
            from tokenizers import Tokenizer

        self._file = file = folder / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"{file} is missing; save the tokenizer with transformers' AutoTokenizer, which writes it")
        _check_parts(file, read_json(file))
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except BaseException as error:
            if not _of_library(error):
                raise
            raise ValueError(f"{file} is no tokenizer: {error}") from None
        self._tokenizer.no_padding()

    def __call__(self, text: str, length: int, vocabulary: int | None = None) -> list[int]:
        """Token ids; see ``tokenize``."""
        return self.tokenize(text, length, vocabulary)[0]

    def tokenize(self, text: str, length: int, vocabulary: int | None = None) -> tuple[list[int], int]:
        """Token ids, and the number of tokens without a cut.

        Args:
            text: the prompt.
            length: the most tokens, with the end token; what is beyond is cut.
            vocabulary: number of rows of the embedding that the ids are for.

        Raises:
            ValueError: a tokenizer that returns nothing, or ids beyond the vocabulary.
        """
        try:
            self._tokenizer.no_truncation()
            whole = self._tokenizer.encode(text, add_special_tokens=False)
            count = len(whole.ids) + self._tokenizer.num_special_tokens_to_add(False)
            self._tokenizer.enable_truncation(length)
            ids: list[int] = self._tokenizer.post_process(whole).ids
        except BaseException as error:
            if not _of_library(error):
                raise
            raise ValueError(f"{self._file} cannot be used: {error}") from None
        if not ids:
            raise ValueError(f"{self._file} gives no token for {text[:40]!r}; expected at least an end token")
        if vocabulary is not None and max(ids) >= vocabulary:
            raise ValueError(
                f"{self._file} gives the token {max(ids)}, of which the text encoder has {vocabulary}: "
                "tokenizer and text encoder are not of one model"
            )
        return ids, count


def _of_library(error: BaseException) -> bool:
    # The library raises plain exceptions; a panic of its Rust code is no Exception.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value."""
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, dict):
            yield one
            stack += one.values()
        elif isinstance(one, list):
            stack += one


def _check_parts(file: Path, content: dict[str, Any]) -> None:
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for part in _objects(content.get(name)):
            kind, pattern = part.get("type"), part.get("Regex")
            if kind is not None and not (isinstance(kind, str) and kind in _PARTS):
                raise ValueError(f"{file} has a {kind!r:.60} in its {name}, which no tokenizer of Wan has")
            if pattern is not None and not (isinstance(pattern, str) and pattern in _PATTERNS):
                raise ValueError(f"{file} has the pattern {pattern!r:.60} in its {name}, which no tokenizer of Wan has")
            _check_template(file, part)
            for key in ("content", "prepend", "replacement"):
                if isinstance(part.get(key), str) and len(part[key]) > _LONGEST_REPLACEMENT:
                    raise ValueError(
                        f"{file} inserts {part[key]!r:.60} in its {name}; expected at most {_LONGEST_REPLACEMENT} "
                        "characters"
                    )


def _check_template(file: Path, part: dict[str, Any]) -> None:
    """Refuse a template with tokens that it does not define, at which the library ends with a panic and a stack."""
    defined = part.get("special_tokens")
    if not isinstance(defined, dict):
        return
    for piece in _objects([part.get("single"), part.get("pair")]):
        token = piece.get("SpecialToken")
        name = token.get("id") if isinstance(token, dict) else None
        if isinstance(name, str) and name not in defined:
            raise ValueError(f"{file} has the token {name!r:.60} in its template, which special_tokens lacks")
