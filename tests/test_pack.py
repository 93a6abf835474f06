"""Packing: every document comes back, held-out ones are not trained on, bad ids are refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixloader import Manifest, MixLoader
from mixloader.errors import ManifestError, TokenError
from mixloader.formats import read_tokens
from mixloader.pack import END_OF_TEXT, pack, write_shard

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 50, trainer)
    return tokenizer


def documents_in(shards, tokenizer, eot):
    tokens = np.concatenate([read_tokens(shard) for shard in shards])
    ends = np.flatnonzero(tokens == eot)
    return [tokenizer.decode(part[part != eot].tolist()) for part in np.split(tokens, ends + 1)[:-1]]


def test_documents_come_back(tmp_path, tokenizer):
    texts = {
        "web": [f"the cat {i} sat, naïvely" for i in range(95)],
        "math": [f"{i} + {i} = {2 * i}" for i in range(40)],
    }
    manifest = pack(texts, tmp_path, tokenizer, fields={"math": "target"}, validation_fraction=0.1, shard_tokens=200)
    assert manifest == Manifest.open(tmp_path)
    assert manifest.vocab_size == tokenizer.get_vocab_size()
    assert manifest.table().fields == (None, "target")
    for domain in manifest.domains:
        train = documents_in(domain.shards, tokenizer, manifest.eot)
        held_out = documents_in(domain.validation, tokenizer, manifest.eot)
        assert train == [t for i, t in enumerate(texts[domain.name]) if i % 10 != 9]
        assert held_out == texts[domain.name][9::10]
        tokens = sum(s.tokens for s in (*domain.shards, *domain.validation))
        text_bytes = sum(len(t.encode()) for t in texts[domain.name])
        assert domain.bytes_per_token == pytest.approx(text_bytes / tokens, abs=1e-4)
    assert len(manifest.domain("web").shards) > 1
    with MixLoader(tmp_path, 2, 8) as loader:
        assert next(loader)["input_ids"].max() < manifest.vocab_size


def test_a_killed_packing_leaves_no_manifest(tmp_path, tokenizer):
    def broken():
        yield from ["one document"] * 300
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack({"a": ["text"] * 30, "b": broken()}, tmp_path, tokenizer)
    with pytest.raises(ManifestError):
        Manifest.load(tmp_path / "manifest.json")
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_domain_without_documents_is_refused(tmp_path, tokenizer):
    with pytest.raises(ManifestError, match="'empty' has no documents"):
        pack({"empty": []}, tmp_path, tokenizer)


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    with pytest.raises(ManifestError, match=r"no token '<\|endoftext\|>'"):
        pack({"a": ["x"]}, tmp_path, tokenizers.Tokenizer(tokenizers.models.BPE()))


@settings(max_examples=30)
@given(
    vocab_size=st.integers(1, 1 << 20),
    tokens=st.lists(st.integers(-3, 1 << 20), min_size=1, max_size=50),
)
def test_ids_outside_the_vocabulary_write_nothing(tmp_path_factory, vocab_size, tokens):
    path = tmp_path_factory.mktemp("shard") / "a.bin"
    bad = [i for i, token in enumerate(tokens) if not 0 <= token < vocab_size]
    if bad:
        with pytest.raises(TokenError, match=f"token {bad[0]} of shard .* has id {tokens[bad[0]]}"):
            write_shard(path, np.array(tokens), vocab_size=vocab_size)
        assert not list(path.parent.iterdir())
    else:
        shard = write_shard(path, np.array(tokens), vocab_size=vocab_size)
        assert shard.dtype == ("uint16" if vocab_size <= 1 << 16 else "uint32")
        assert read_tokens(shard).tolist() == tokens


@pytest.mark.parametrize("tokens", [np.zeros(0, np.int64), np.zeros(3), np.zeros((2, 2), np.int64), np.array([True])])
def test_what_is_no_row_of_tokens_is_refused(tmp_path, tokens):
    with pytest.raises(TokenError, match="needs a row of integer tokens"):
        write_shard(tmp_path / "a.bin", tokens, vocab_size=10)


def test_the_manifest_is_plain_json(tmp_path, tokenizer):
    pack({"a": ["some text"] * 30}, tmp_path, tokenizer)
    content = json.loads((tmp_path / "manifest.json").read_text())
    shard = content["domains"][0]["shards"][0]
    assert shard["path"] == "a/train_000.bin"
    assert set(shard) == {"path", "format", "dtype", "offset", "tokens", "bytes", "digest"}
