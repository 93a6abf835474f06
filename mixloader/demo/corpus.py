"""The demo's corpus: eight domains of real text from what every installation has, in a few seconds.

Source field: Python's standard library without its docstrings, those docstrings and the language
reference, the C++ headers that torch ships, docstrings and README texts of installed packages, and
licence texts. Target field: sympy's docstrings and generated problems (problems.py). Files are only
read, docstrings are taken with `ast`, and nothing is imported or run. Files come in an order keyed by
their path, so that a domain under its cap is a sample of all its files and not the first of the alphabet.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import itertools
import re
import sys
import sysconfig
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mixloader.demo import problems
from mixloader.errors import MixLoaderError
from mixloader.manifest import Manifest
from mixloader.pack import pack

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Document = tuple[str, str]
"""Where a text came from, under a name that is the same on every machine, and the text."""

Node = Path | zipfile.Path
"""A file or folder, on disk or in the zip archive that holds some installations' standard library."""

DOCUMENT_CHARACTERS = (200, 24_000)
"""Shorter texts are left out, longer ones are cut at the end of a line."""

_NOT_TEXT = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "testing",
    "idlelib",
    "encodings",
}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_LICENCE = re.compile(r"(licen[cs]e|copying|notice)[^/]*$", re.IGNORECASE)


@dataclass(frozen=True)
class Recipe:
    """How a domain is made: readers are emptied in turn up to `cap` bytes.

    The `spare` readers follow where the others leave it under `minimum` bytes; if they do too, the
    domain is left out.
    """

    field: str
    cap: int
    minimum: int
    readers: tuple[Callable[[], Iterator[Document]], ...]
    spare: tuple[Callable[[], Iterator[Document]], ...] = ()


@dataclass(frozen=True)
class Corpus:
    """Documents of each domain, held out by name; `notes` says in sentences what was short."""

    fields: dict[str, str]
    train: dict[str, list[str]]
    held_out: dict[str, list[str]]
    notes: list[str] = field(default_factory=list)

    def bytes_of(self, domain: str) -> int:
        """UTF-8 bytes of a domain, held-out documents included."""
        return sum(len(text.encode()) for text in (*self.train[domain], *self.held_out[domain]))


def build_corpus(scale: float = 1.0, held_out: float = 0.1) -> Corpus:
    """Read all domains. scale: multiplies caps and minima, for tests. held_out: share set aside.

    Which documents are held out depends on their names alone, so that a base model that was trained
    on another machine has not read what is held out on this one. Exact duplicates (white space
    aside) are dropped over all domains. Raises MixLoaderError if fewer than six domains remain.
    """
    corpus = Corpus({}, {}, {}, [])
    seen: set[int] = set()
    for name, recipe in RECIPES.items():
        documents = _collect(recipe, scale, seen)
        size = sum(len(text.encode()) for _, text in documents)
        if size < recipe.minimum * scale or len(documents) < 2:
            corpus.notes.append(f"domain {name!r} is left out: only {size / 1e6:.2f} MB of text were found for it here")
            continue
        corpus.fields[name] = recipe.field
        # At least one document each way, however small the domain.
        limits = sorted(_share(origin) for origin, _ in documents)
        limit = min(max(held_out, limits[1]), limits[-1])
        corpus.held_out[name] = [text for origin, text in documents if _share(origin) < limit]
        corpus.train[name] = [text for origin, text in documents if _share(origin) >= limit]
    if len(corpus.fields) < 6:
        raise MixLoaderError(
            f"only {len(corpus.fields)} domains of text were found in the Python installation {sys.prefix}, "
            f"expected at least 6: {'; '.join(corpus.notes)}. Check that torch and numpy are installed whole"
        )
    return corpus


def _share(origin: str) -> float:
    """A number in [0, 1) that looks random and is the same for this document on every machine."""
    return zlib.crc32(f"held out {origin}".encode()) / 2**32


def _collect(recipe: Recipe, scale: float, seen: set[int]) -> list[Document]:
    """Documents up to the cap; `seen` holds the digests of all texts taken so far."""
    kept: list[Document] = []
    size, (shortest, longest) = 0, DOCUMENT_CHARACTERS
    for reader in (*recipe.readers, *recipe.spare):
        if reader in recipe.spare and size >= recipe.minimum * scale:
            break
        for name, text in reader():
            text = text.strip()
            if len(text) > longest:
                text = text[: text.rfind("\n", 0, longest) + 1 or longest].rstrip()
            digest = hash("".join(text.split()))
            if len(text) < shortest or digest in seen:
                continue
            seen.add(digest)
            kept.append((name, text + "\n"))
            size += len(text.encode()) + 1
            if size >= recipe.cap * scale:
                return kept
    return kept


def pack_corpus(corpus: Corpus, out: Path, tokenizer: Tokenizer) -> Manifest:
    """Write `corpus` as shards under `out`, with its own held-out documents as validation shards."""
    train = pack(corpus.train, out, tokenizer, fields=corpus.fields, validation_fraction=0)
    aside = pack(corpus.held_out, out / "held_out", tokenizer, validation_fraction=0)
    domains = (replace(domain, validation=aside.domain(domain.name).shards) for domain in train.domains)
    manifest = replace(train, domains=tuple(domains))
    manifest.save(out / "manifest.json")
    return manifest


# Where texts are


def _standard_library() -> Node | None:
    """The folder of the standard library, or the zip archive that stands in for it."""
    folder = Path(sysconfig.get_path("stdlib"))
    if (folder / "json").is_dir():
        return folder
    archives = [path for path in sys.path if path.endswith(".zip") and zipfile.is_zipfile(path)]
    return zipfile.Path(archives[0]) if archives else None


def _package(name: str) -> Node | None:
    """The folder of an installed top-level package, found without importing it."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def _below(folder: Node | None, name: str) -> Node | None:
    return folder / name if folder is not None else None


def _files(root: Node | None, prefix: str, suffixes: tuple[str, ...]) -> list[tuple[str, Node]]:
    """Files under `root` by name `prefix/path`, tests left out, in an order keyed by that name."""
    found: list[tuple[str, Node]] = []
    queue: list[tuple[str, Node]] = [(prefix, root)] if root is not None and root.is_dir() else []
    while queue:
        name, folder = queue.pop()
        for node in folder.iterdir():
            path = f"{name}/{node.name}"
            if node.is_dir():
                if node.name not in _NOT_TEXT:
                    queue.append((path, node))
            elif node.name.endswith(suffixes) and not node.name.startswith(("test_", "conftest")):
                found.append((path, node))
    return sorted(found, key=lambda item: (zlib.crc32(item[0].encode()), item[0]))


def _texts(files: Iterable[tuple[str, Node]]) -> Iterator[Document]:
    """What can be read as UTF-8; what cannot is not text and is passed over."""
    for name, node in files:
        try:
            yield name, node.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue


# Readers: each returns a fresh iterator over named documents


def _python_code(root: Node | None, prefix: str) -> Iterator[Document]:
    """Python sources without docstrings, which are domains of their own."""
    for name, text in _texts(_files(root, prefix, (".py",))):
        dropped = {n for first, last, _ in _docstrings(text) for n in range(first, last + 1)}
        lines = (line.rstrip() for n, line in enumerate(text.split("\n"), start=1) if n not in dropped)
        yield name, "\n".join(lines)


def _python_docs(root: Node | None, prefix: str) -> Iterator[Document]:
    """All docstrings of a file as one document."""
    for name, text in _texts(_files(root, prefix, (".py",))):
        yield name + " docs", "\n\n".join(doc for _, _, doc in _docstrings(text))


def _docstrings(source: str) -> list[tuple[int, int, str]]:
    """First line, last line (from 1) and cleaned text of each docstring, in the order of the file."""
    if '"""' not in source and "'''" not in source:
        return []  # docstrings in single quotes are too rare to parse a file for
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning: other people's escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found: list[tuple[int, int, str]] = []
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            below = getattr(node, block, None)
            queue.extend(below if isinstance(below, list) else ())
        if not isinstance(node, _DOCUMENTED):
            continue
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            value = first.value.value
            if isinstance(value, str):
                found.append((first.lineno, first.end_lineno or first.lineno, inspect.cleandoc(value)))
    return sorted(found)


def _reference_topics() -> Iterator[Document]:
    """The language reference that `help()` shows: a dict of strings in pydoc_data/topics.py."""
    root = _standard_library()
    for _, text in _texts(_files(_below(root, "pydoc_data"), "pydoc_data", ("topics.py",))):
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign):
                for topic, body in sorted(ast.literal_eval(node.value).items()):
                    yield f"pydoc_data/{topic}", body


def _cpp_headers(root: Node | None, prefix: str) -> Iterator[Document]:
    """C and C++ headers, without those that a program wrote."""
    for name, text in _texts(_files(root, prefix, (".h", ".hpp", ".cuh"))):
        if "generated" not in text[:2000].lower():
            yield name, text


def _distributions() -> list[tuple[str, str, importlib.metadata.Distribution]]:
    """Name, METADATA text and distribution of what is installed, but for mixloader itself."""
    found = {}
    for dist in importlib.metadata.distributions():
        text = dist.read_text("METADATA") or ""
        name = re.search(r"^Name: *(\S+)", text, re.MULTILINE)
        if name and name[1].lower() != "mixloader":
            found[name[1]] = (name[1], text, dist)
    return [found[name] for name in sorted(found)]


def _readmes() -> Iterator[Document]:
    """The long descriptions in METADATA: what follows the header."""
    for name, text, _ in _distributions():
        yield f"{name}/README", text.partition("\n\n")[2]


def _licences() -> Iterator[Document]:
    """Licence files of Python and of every distribution, named without versions."""
    yield from _texts(_files(_standard_library(), "stdlib", ("LICENSE.txt",)))
    for name, _, dist in _distributions():
        listed = [file for file in dist.files or () if _LICENCE.search(str(file))]
        yield from _texts(
            ("/".join((name, *file.parts[1:])), Path(str(dist.locate_file(file))))
            for file in sorted(listed)
            if file.suffix not in {".py", ".pyc", ".h"}
        )


def _docs_of(*packages: str) -> Callable[[], Iterator[Document]]:
    def read() -> Iterator[Document]:
        for package in packages:
            yield from _python_docs(_package(package), package)

    return read


def _generated(family: str) -> Callable[[], Iterator[Document]]:
    def read() -> Iterator[Document]:
        for number, text in enumerate(itertools.islice(problems.documents(family, seed=0), 5000)):
            yield f"{family}/{number}", text

    return read


MB = 1_000_000

RECIPES: dict[str, Recipe] = {
    "python_code": Recipe(
        "source",
        2 * MB,
        MB // 2,
        (lambda: _python_code(_standard_library(), "stdlib"),),
        (lambda: _python_code(_package("torch"), "torch"),),
    ),
    "cpp_code": Recipe(
        "source",
        2 * MB,
        MB // 2,
        (lambda: _cpp_headers(_below(_package("torch"), "include"), "torch/include"),),
        (lambda: _cpp_headers(Path(sysconfig.get_path("include")), "python/include"),),
    ),
    "python_docs": Recipe(
        "source",
        5 * MB // 4,
        MB // 2,
        (_reference_topics, lambda: _python_docs(_standard_library(), "stdlib")),
        (_docs_of("torch"),),
    ),
    "package_docs": Recipe(
        "source", 3 * MB // 2, MB // 2, (_readmes, _docs_of("numpy", "networkx")), (_docs_of("torch"),)
    ),
    "legal": Recipe(
        "source",
        MB,
        MB // 8,
        (_licences,),
        (lambda: _texts(_files(Path("/usr/share/common-licenses"), "common-licenses", ("",))),),
    ),
    "math_docs": Recipe("target", 3 * MB // 2, MB // 2, (_docs_of("sympy", "mpmath"),)),
    "arithmetic": Recipe("target", MB, MB // 2, (_generated("arithmetic"),)),
    "word_problems": Recipe("target", MB, MB // 2, (_generated("word_problems"),)),
}
"""The domains, sources first, 10.5 MB in all: licences fall short of their cap on most machines."""
