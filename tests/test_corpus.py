"""The demo's corpus: what it must hold, and what it does on a Python that lacks some of it."""

import ast
import itertools
import json
import os
import re
import subprocess
import sys
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from mixloader.demo import corpus as module
from mixloader.demo import problems
from mixloader.demo.corpus import RECIPES, Corpus, build_corpus, pack_corpus
from mixloader.documents import train_tokenizer
from mixloader.errors import MixLoaderError
from mixloader.formats import read_tokens
from mixloader.manifest import Manifest


@pytest.fixture(scope="module")
def whole() -> Corpus:
    return build_corpus()


@pytest.fixture(scope="module")
def small() -> Corpus:
    return build_corpus(scale=0.1)


def test_at_least_six_domains_and_eight_megabytes_with_both_fields(whole):
    assert len(whole.fields) >= 6
    assert set(whole.fields.values()) == {"source", "target"}
    assert sum(map(whole.bytes_of, whole.fields)) >= 8e6
    for name in whole.fields:
        assert RECIPES[name].minimum <= whole.bytes_of(name) <= RECIPES[name].cap + 30_000


def test_no_document_twice(whole):
    texts = [
        "".join(text.split()) for part in (whole.train, whole.held_out) for texts in part.values() for text in texts
    ]
    assert len(texts) == len(set(texts)) > 2000


def test_what_is_held_out_stays_held_out_in_a_corpus_of_another_size(whole, small):
    held_out = {text for texts in whole.held_out.values() for text in texts}
    both = 0
    for name in small.fields:
        assert held_out.isdisjoint(small.train[name])
        both += len(held_out.intersection(small.held_out[name]))
        assert small.train[name]
        assert small.held_out[name]
    assert both > 10


def test_the_same_corpus_in_another_process(small):
    script = (
        "import json; from mixloader.demo.corpus import build_corpus; c = build_corpus(scale=0.1); "
        "print(json.dumps([c.fields, c.train, c.held_out]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "1"},
    )
    assert json.loads(result.stdout) == [small.fields, small.train, small.held_out]


def test_packing_keeps_the_texts_and_the_split(small, tmp_path):
    tokenizer = train_tokenizer((text for texts in small.train.values() for text in texts[:20]), vocab_size=400)
    pack_corpus(small, tmp_path, tokenizer)
    manifest = Manifest.load(tmp_path / "manifest.json")
    assert {d.name: d.field for d in manifest.domains} == small.fields
    for domain in manifest.domains:
        for shards, texts in ((domain.shards, small.train), (domain.validation, small.held_out)):
            tokens = np.concatenate([read_tokens(shard) for shard in shards])
            assert (tokens == manifest.eot).sum() == len(texts[domain.name])
            assert tokenizer.decode(tokens, skip_special_tokens=True) == "".join(texts[domain.name])


# Installations that lack something


def test_a_missing_package_leaves_its_domain_out_with_a_word(monkeypatch):
    found = module._package
    monkeypatch.setattr(module, "_package", lambda name: None if name in ("sympy", "mpmath") else found(name))
    corpus = build_corpus(scale=0.1)
    assert "math_docs" not in corpus.fields
    assert len(corpus.fields) >= 6
    assert any("math_docs" in note for note in corpus.notes)


def test_without_a_standard_library_other_files_fill_in(monkeypatch, tmp_path):
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path / name))
    monkeypatch.setattr(module.sys, "path", [str(tmp_path)])
    corpus = build_corpus(scale=0.1)
    assert {"python_code", "python_docs"} <= corpus.fields.keys()


def test_too_little_text_is_an_error_that_says_what_was_found(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_package", lambda name: None)
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path / name))
    monkeypatch.setattr(module.sys, "path", [])
    monkeypatch.setattr(module, "_distributions", list)
    with pytest.raises(MixLoaderError, match=r"only [23] domains .* expected at least 6.*'python_code'"):
        build_corpus(scale=0.1)


def test_a_zipped_standard_library_is_read(monkeypatch, tmp_path):
    archive = tmp_path / "python.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("json/decoder.py", '"""' + "Decodes. " * 50 + '"""\n' + "x = 1\n" * 100)
        file.writestr("json/tests/test_decode.py", "x = 2\n" * 100)
        file.writestr("pydoc_data/topics.py", f"topics = {{'if': {'The if statement. ' * 30!r}}}")
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path / "no such folder"))
    monkeypatch.setattr(module.sys, "path", [str(archive)])
    root = module._standard_library()
    assert dict(module._reference_topics()) == {"pydoc_data/if": "The if statement. " * 30}
    codes = dict(module._python_code(root, "stdlib"))
    assert "stdlib/json/decoder.py" in codes
    assert "Decodes" not in codes["stdlib/json/decoder.py"]
    assert not any("tests" in name for name in codes)


def test_docstrings_are_those_that_ast_finds():
    checked = 0
    for path in (Path(ast.__file__), Path(json.__file__), Path(subprocess.__file__)):
        source = path.read_text()
        expected = [
            ast.get_docstring(node)
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ]
        found = [text for _, _, text in module._docstrings(source)]
        assert sorted(found) == sorted(expected)
        checked += len(found)
    assert checked > 50


def test_files_that_are_no_python_or_no_text_are_passed_over(tmp_path):
    (tmp_path / "old.py").write_text("print 'two'\n" * 50 + '"""')
    (tmp_path / "bad.py").write_bytes(b"\xff\xfe" * 200)
    assert [name for name, _ in module._python_code(tmp_path, "p")] == ["p/old.py"]
    assert dict(module._python_docs(tmp_path, "p")) == {"p/old.py docs": ""}


# Generated problems

EQUATION = re.compile(r"(?<![\d*/+=)-])(?<![*/+=)-] )([\d(][\d +*/()-]*(?: = -?[\d(][\d +*/()-]*)+)(?=[^\d*+/()-]|$)")


def _value(expression: str) -> Fraction:
    return eval(re.sub(r"\d+", r"Fraction(\g<0>)", expression), {"Fraction": Fraction})


@pytest.mark.parametrize("family", ["arithmetic", "word_problems"])
def test_every_equation_in_a_solution_is_true(family):
    equations = 0
    for document in itertools.islice(problems.documents(family, seed=3), 300):
        for line in document.splitlines():
            for match in EQUATION.finditer(line):
                sides = [_value(side.strip()) for side in match[1].split(" = ")]
                assert len(set(sides)) == 1, line
                equations += 1
    assert equations > 3000


@pytest.mark.parametrize("family", ["arithmetic", "word_problems"])
def test_problems_depend_on_the_seed_alone(family):
    first, again, other = (list(itertools.islice(problems.documents(family, seed), 50)) for seed in (1, 1, 2))
    assert first == again
    assert not set(first) & set(other)


def test_answers_are_right():
    """Against another way of computing them, for the kinds where a library has one."""
    import math

    checked = set()
    for document in itertools.islice(problems.documents("arithmetic", seed=4), 400):
        for block in document.split("\n\n"):
            answer = re.split(r"Answer: |Result: |\n= ", block)[-1]
            if match := re.search(r"greatest common divisor of (\d+) and (\d+)", block):
                assert int(answer) == math.gcd(int(match[1]), int(match[2]))
            elif match := re.search(r"Divide (\d+) by (\d+)", block):
                assert answer == "{} remainder {}".format(*divmod(int(match[1]), int(match[2])))
            elif match := re.search(r"Write (\d+) in binary", block):
                assert int(answer, 2) == int(match[1])
            elif match := re.search(r"Write (\d+) as a product", block):
                factors = [int(factor) for factor in answer.split(" * ")]
                assert math.prod(factors) == int(match[1])
                assert all(factor % p for factor in factors for p in range(2, math.isqrt(factor) + 1))
            elif match := re.search(r"(?:Work out|Simplify|Evaluate) (.*)\.\n", block):
                assert Fraction(answer) == _value(match[1])
            else:
                continue
            checked.add(match.re.pattern)
    assert len(checked) == 5
