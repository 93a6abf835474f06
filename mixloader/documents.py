"""Texts on disk as documents, and a tokenizer trained on them: what `python -m mixloader pack` packs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mixloader.errors import ConfigError, MixLoaderError
from mixloader.pack import END_OF_TEXT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")


class Documents:
    """The texts below a path, in the order of their file names; may be iterated again and again.

    A .txt file is one document; a line of a .jsonl file is one, under the key "text". Either may be gzipped.
    Raises ConfigError if there is no such file, MixLoaderError at a file or line that cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        found = [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.is_file())
        self.files = [file for file in found if file.name.endswith(SUFFIXES)]
        if not self.files:
            what = "holds no" if self.path.is_dir() else "is no" if self.path.exists() else "does not exist; expected a"
            raise ConfigError(f"{self.path} {what} file that ends in {', '.join(SUFFIXES)}")

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            try:
                with _open_text(file) as stream:
                    if file.name.removesuffix(".gz").endswith(".jsonl"):
                        yield from _texts_of_lines(file, stream)
                    else:
                        yield stream.read()
            except (OSError, EOFError, UnicodeDecodeError) as error:
                raise MixLoaderError(f"cannot read {file}: {error}; expected UTF-8 text") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (Radford et al. 2019) of at most `vocab_size` ids, "<|endoftext|>" among them.

    Digits stay single, so that numbers are written the same way wherever they stand. Raises ConfigError
    below 257 ids, one for each byte and the end of text.
    """
    if vocab_size < 257:
        raise ConfigError(f"vocab_size is {vocab_size}; expected at least 257: the 256 bytes and {END_OF_TEXT}")
    tokenizers = import_tokenizers()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer.json; raises ConfigError if it is not one."""
    try:
        return import_tokenizers().Tokenizer.from_file(str(path))
    except MixLoaderError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise ConfigError(f"cannot read the tokenizer {path}: {error}; expected a tokenizer.json") from error


def import_tokenizers() -> Any:
    """The tokenizers package, or a ConfigError that says how to get it."""
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError("packing text needs the package tokenizers; pip install 'mixloader[hf]'") from error
    return tokenizers


def _open_text(file: Path) -> IO[str]:
    return gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")


def _texts_of_lines(file: Path, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise MixLoaderError(f'{file}, line {number} is no JSON object with a "text"') from error
        if not isinstance(text, str):
            raise MixLoaderError(f'{file}, line {number} has a "text" that is no text: {text!r:.60}')
        yield text
