"""The command line: `python -m mixloader train | demo | pack | replay | report | fit-agent`.

A verb's parts are imported when it runs. What mixloader raises on purpose is printed as one sentence, and the
exit code is 2; a bug keeps its traceback.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mixloader.errors import ConfigError, MixLoaderError

USAGE = """usage: python -m mixloader VERB ...

  train CONFIG [--key value ...]     train a model as a YAML file says, or go on with a run that was killed
  demo [...]                         see the agent mix a corpus made from this machine's own files
  pack OUT NAME=PATH ... [...]       tokenize folders of text into shards and a manifest
  replay RECORD DATA [--steps N]     draw a recorded run's token stream again and print its checksum
  report RUN ...                     a table and a picture of finished runs
  fit-agent [...]                    train the agent's weights anew

`python -m mixloader VERB --help` says more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns its exit code: 0, 2 for a mistake in what was asked, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb in ("-h", "--help"):
        print(USAGE)
        return 0
    if verb not in VERBS:
        print(f"error: unknown verb {verb!r}; the verbs are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        return VERBS[verb](rest)
    except MixLoaderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def train_verb(argv: Sequence[str]) -> int:
    from mixloader.config import ModelConfig, TrainConfig

    parser = _parser("train", "Train a model; the same command again goes on with a run that was killed.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"keys:\n{TrainConfig.__doc__}\nkeys of model, as --model.KEY:\n{ModelConfig.__doc__}"
    parser.usage = "python -m mixloader train [config.yaml] [--no-progress] [--key value ...]"
    parser.add_argument("--no-progress", action="store_true", help="no progress bar, also on a terminal")
    # Taken by hand: argparse would take the value of a key that it does not know for the file.
    path = argv[0] if argv and not argv[0].startswith("-") else None
    args, overrides = parser.parse_known_args(argv if path is None else argv[1:])
    config = TrainConfig.load(path, overrides)
    from mixloader.train.trainer import train

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = train(config, progress=False if args.no_progress else None)
    print(f"{'domain':<24}{'before':>10}{'after':>10}   (held-out loss, nats a token)")
    for name, before in result.losses_before.items():
        print(f"{name:<24}{before:>10.4f}{result.losses_after[name]:>10.4f}")
    print(f"{result.steps} steps, {result.tokens} tokens, {result.tokens_per_second:,.0f} tokens/s")
    print(f"record {result.record}\ncheckpoint {result.checkpoint}")
    return 0


def demo_verb(argv: Sequence[str]) -> int:
    from mixloader.demo.run import main as demo

    return demo(list(argv))


def pack_verb(argv: Sequence[str]) -> int:
    parser = _parser(
        "pack", "Tokenize folders or files of .txt and .jsonl (a text under the key `text`), gzipped or not."
    )
    parser.add_argument("out", type=Path, help="folder to write shards, tokenizer.json and manifest.json to")
    parser.add_argument("domains", nargs="+", metavar="name=path", help="a domain and where its texts are")
    parser.add_argument(
        "--target", action="append", default=[], metavar="name", help="a domain to learn; the rest is source"
    )
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json with <|endoftext|>; by default one is trained")
    parser.add_argument("--vocab_size", type=int, default=32768, help="ids of the tokenizer that is trained")
    parser.add_argument("--validation_fraction", type=float, default=0.05, help="share of documents held out")
    args = parser.parse_args(argv)
    from mixloader.documents import Documents, load_tokenizer, train_tokenizer
    from mixloader.pack import pack

    documents = {}
    for pair in args.domains:
        name, equals, path = pair.partition("=")
        if not name or not equals or name in documents:
            raise ConfigError(f"{pair!r} is no new name=path; give every domain once, as name=path")
        documents[name] = Documents(path)
    for name in args.target:
        if name not in documents:
            raise ConfigError(f"--target {name} is no domain; the domains are {', '.join(documents)}")
    if args.tokenizer is not None:
        tokenizer = load_tokenizer(args.tokenizer)
    else:
        tokenizer = train_tokenizer((text for texts in documents.values() for text in texts), args.vocab_size)
    fields = {name: "target" if name in args.target else "source" for name in documents} if args.target else {}
    manifest = pack(documents, args.out, tokenizer, fields=fields, validation_fraction=args.validation_fraction)
    for domain in manifest.domains:
        held_out = sum(shard.tokens for shard in domain.validation)
        print(f"{domain.name:<24}{domain.tokens:>14,} tokens{held_out:>12,} held out   {domain.field or ''}")
    print(f"manifest {args.out / 'manifest.json'}")
    return 0


def replay_verb(argv: Sequence[str]) -> int:
    parser = _parser("replay", "Draw the token stream of a recorded run again, as a loader of these data does.")
    parser.add_argument("record", type=Path, help="a run's record.jsonl")
    parser.add_argument("data", type=Path, help="the data of that run: a manifest.json or a folder of shards")
    parser.add_argument("--steps", type=int, help="optimizer steps to draw; by default all that the record knows")
    args = parser.parse_args(argv)
    import numpy as np

    from mixloader.record import read_record, replay

    record = read_record(args.record)
    steps = record.steps if args.steps is None else args.steps
    if not 0 <= steps <= record.steps:
        raise ConfigError(f"--steps is {steps}, but {args.record} knows the weights of steps 0 to {record.steps}")
    digest = hashlib.sha256()
    with replay(record, args.data, max_steps=steps) as loader:
        rows = np.zeros(len(loader.names), dtype=np.int64)
        for batch in loader:
            # Each row is one window of seq_len + 1 tokens, so the sum does not depend on the size of batches.
            windows = np.concatenate((batch["input_ids"].numpy(), batch["targets"].numpy()[:, -1:]), axis=1)
            digest.update(windows.astype("<i8").tobytes())
            rows += np.bincount(batch["domain_ids"].numpy(), minlength=len(rows))
        for name, count in zip(loader.names, rows, strict=True):
            print(f"{name:<24}{count:>12,} rows")
        print(f"{steps} steps of {loader.global_batch} rows of {loader.seq_len} tokens")
    print(f"sha256 {digest.hexdigest()}")
    return 0


def report_verb(argv: Sequence[str]) -> int:
    from mixloader.report import main as report

    return report(list(argv))


def fit_agent_verb(argv: Sequence[str]) -> int:
    from mixloader.agent.fit import main as fit

    return fit(list(argv))


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"python -m mixloader {verb}", description=description, allow_abbrev=False)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train_verb,
    "demo": demo_verb,
    "pack": pack_verb,
    "replay": replay_verb,
    "report": report_verb,
    "fit-agent": fit_agent_verb,
}
