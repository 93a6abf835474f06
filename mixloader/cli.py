"""The command line: `python -m mixloader train | demo | pack | index | verify | replay | locate | export | score |
report | mixtures | fit | collect | fit-agent`.

A verb's parts are imported when it runs. What mixloader raises on purpose is printed as one sentence, and the
exit code is 2; a bug keeps its traceback.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mixloader.errors import ConfigError, MixLoaderError

if TYPE_CHECKING:
    from mixloader.manifest import Manifest

USAGE = """usage: python -m mixloader VERB ...

  train CONFIG [--key value ...]     train a model as a YAML file says, or go on with a run that was killed
  compare SUITE [--out DIR] [...]    run policies side by side on the same data, tokens and seeds
  demo [...]                         see the agent mix a corpus made from this machine's own files
  pack OUT NAME=PATH ... [...]       tokenize folders of text into shards and a manifest
  index OUT NAME=PATH ... [...]      write a manifest over shards that stay where they are
  verify MANIFEST                    compare the shards of a manifest with what it says of them
  replay RECORD DATA [--steps N]     draw a recorded run's token stream again and print its checksum
  locate RECORD DATA --step S        say where the rows of a recorded step stood
  export RUN OUT [--dtype D]         write a run's model for transformers' from_pretrained
  score RUN DATA --out FILE          a reference model's loss on each domain, for policies that need it
  report RUN ...                     a table and a picture of finished runs
  mixtures OUT -n N [...]            sample mixtures to train small runs on
  fit --method NAME [...]            fit what such runs ended with (regmix, olmix, ...) and propose a mixture
  collect [SPLIT] [...]              run the episodes that the agent is trained on, and pack them
  fit-agent [...]                    train the agent's weights anew

`python -m mixloader VERB --help` says more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns its exit code: 0, 1 for damage found, 2 for a mistake in what was asked, 130 for Ctrl-C."""
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

    first = os.environ.get("RANK", "0") == "0"  # of those that torchrun has started
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    result = train(config, progress=False if args.no_progress else None)
    if not first:
        return 0
    print(f"{'domain':<24}{'before':>10}{'after':>10}   (held-out loss, nats a token)")
    for name, before in result.losses_before.items():
        print(f"{name:<24}{before:>10.4f}{result.losses_after[name]:>10.4f}")
    print(f"{result.steps} steps, {result.tokens} tokens, {result.tokens_per_second:,.0f} tokens/s")
    print(f"record {result.record}\ncheckpoint {result.checkpoint}")
    return 0


def compare_verb(argv: Sequence[str]) -> int:
    from mixloader.compare.run import main as compare

    return compare(list(argv))


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

    documents = {name: Documents(path) for name, path in _named_paths(args.domains).items()}
    fields = _fields(documents, args.target)
    if args.tokenizer is not None:
        tokenizer = load_tokenizer(args.tokenizer)
    else:
        tokenizer = train_tokenizer((text for texts in documents.values() for text in texts), args.vocab_size)
    manifest = pack(documents, args.out, tokenizer, fields=fields, validation_fraction=args.validation_fraction)
    _print_domains(manifest)
    print(f"manifest {args.out / 'manifest.json'}")
    return 0


def index_verb(argv: Sequence[str]) -> int:
    parser = _parser(
        "index",
        "Write a manifest over shards of tokens that stay where they are: nanoGPT, llm.c, Megatron, datatrove, "
        "NumPy and OLMo, MDS, litData; plain, or compressed with Zstandard or gzip; on disk or at URLs.",
    )
    parser.add_argument("out", type=Path, help="the manifest: a .json file, or a folder for its manifest.json")
    parser.add_argument("domains", nargs="+", metavar="name=path", help="a domain and its shards: file, folder or URL")
    parser.add_argument(
        "--target", action="append", default=[], metavar="name", help="a domain to learn; the rest is source"
    )
    parser.add_argument("--format", help="of the shards; by default it is told by name and content")
    parser.add_argument("--dtype", help="of tokens in files that do not say it; default uint16")
    parser.add_argument("--column", help="of MDS samples: the one with the tokens, if several might be")
    parser.add_argument("--documents", choices=["samples"], help="MDS samples are documents though all have one size")
    parser.add_argument("--checksums", action="store_true", help="SHA-256 of every file, for verify")
    parser.add_argument("--blocks", action="store_true", help="checksums of blocks, for every read")
    parser.add_argument(
        "--validation_tokens", type=int, default=0, metavar="N", help="tokens to hold out of each domain"
    )
    parser.add_argument("--eot", type=int, help="id of the end-of-text token; counts documents")
    parser.add_argument("--vocab_size", type=int, help="ids are below it; every token is checked")
    args = parser.parse_args(argv)
    from mixloader.index import write_index

    if args.validation_tokens < 0:
        raise ConfigError(f"--validation_tokens is {args.validation_tokens}; expected 0 or more")
    paths = _named_paths(args.domains)
    fields = _fields(paths, args.target)
    how = {
        key: value for key in ("format", "dtype", "column", "documents") if (value := getattr(args, key)) is not None
    }
    manifest = write_index(
        args.out,
        {name: {"path": path, "field": fields.get(name), **how} for name, path in paths.items()},
        checksums=args.checksums,
        blocks=args.blocks,
        validation_tokens=args.validation_tokens,
        eot=args.eot,
        vocab_size=args.vocab_size,
        progress=None,
    )
    _print_domains(manifest)
    path = args.out if args.out.suffix == ".json" else args.out / "manifest.json"
    print(f"manifest {path}")
    unread = {s.path for d in manifest.domains for s in (*d.shards, *d.validation) if not s.is_ready}
    if args.blocks and unread:
        print(
            f"no block checksums of {len(unread)} files, which are compressed or elsewhere: they have --checksums alone"
        )
    if outside := manifest.roots_outside(path):
        print(f"shards lie outside its folder: open it with Manifest.open({str(path)!r}, roots={outside!r})")
    return 0


def verify_verb(argv: Sequence[str]) -> int:
    parser = _parser("verify", "Compare sizes, digests and block checksums of a manifest's shards with their files.")
    parser.add_argument("manifest", type=Path, help="a manifest.json, or its folder")
    _add_root(parser)
    args = parser.parse_args(argv)
    from mixloader.index import verify

    damaged, orphans = verify(args.manifest, roots=args.root, progress=None)
    for message in damaged:
        print(f"bad: {message}")
    for path in orphans:
        print(f"not in the manifest: {path}")
    print(f"{len(damaged)} bad, {len(orphans)} not in the manifest")
    return 1 if damaged else 0


def replay_verb(argv: Sequence[str]) -> int:
    parser = _parser("replay", "Draw the token stream of a recorded run again, as a loader of these data does.")
    parser.add_argument("record", type=Path, help="a run's record.jsonl")
    parser.add_argument("data", type=Path, help="the data of that run: a manifest.json or a folder of shards")
    parser.add_argument("--steps", type=int, help="optimizer steps to draw; by default all that the record knows")
    _add_root(parser)
    args = parser.parse_args(argv)
    import numpy as np

    from mixloader.record import read_record
    from mixloader.replay import replay

    record = read_record(args.record)
    steps = record.steps if args.steps is None else args.steps
    if not 0 <= steps <= record.steps:
        raise ConfigError(f"--steps is {steps}, but {args.record} knows the weights of steps 0 to {record.steps}")
    digest = hashlib.sha256()
    with replay(record, args.data, roots=args.root, max_steps=steps) as loader:
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


def locate_verb(argv: Sequence[str]) -> int:
    parser = _parser("locate", "Say where the rows of a recorded step stood: domain, shard, token and document.")
    parser.add_argument("record", type=Path, help="a run's record.jsonl")
    parser.add_argument("data", type=Path, help="the data of that run: a manifest.json or a folder of shards")
    parser.add_argument("--step", type=int, required=True, help="the plan step, from 0")
    parser.add_argument("--row", type=int, help="a row of the global batch, from 0; by default all")
    _add_root(parser)
    args = parser.parse_args(argv)
    from mixloader.record import read_record
    from mixloader.replay import locate

    record = read_record(args.record)
    rows = range(record.header["global_batch"]) if args.row is None else [args.row]
    if not all(0 <= row < record.header["global_batch"] for row in rows):
        raise ConfigError(f"--row is {args.row}; a step of this run has {record.header['global_batch']} rows, from 0")
    for place in locate(record, args.data, args.step, rows, roots=args.root):
        document = "" if place.document is None else f"  document {place.document} + {place.offset}"
        print(
            f"row {place.row:<6}{place.domain:<24} epoch {place.epoch:<4} {place.shard} token {place.token}{document}"
        )
    return 0


def export_verb(argv: Sequence[str]) -> int:
    parser = _parser("export", "Write the model of a run as a folder that from_pretrained of transformers reads.")
    parser.add_argument("run", type=Path, help="a run's folder, or a checkpoint in it")
    parser.add_argument("out", type=Path, help="the folder to write, which must not exist yet")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of parameters")
    parser.add_argument(
        "--like",
        type=Path,
        help="a folder of transformers, whose tokenizer is copied and whose special tokens are kept; by default the "
        "one that the run began with, if any",
    )
    args = parser.parse_args(argv)
    import torch

    from mixloader.train.checkpoint import load_model, read_state, run_checkpoint
    from mixloader.train.hf_checkpoint import export_hf, is_hf_folder

    model, like = load_model(args.run), args.like
    if like is None:
        began = read_state(run_checkpoint(args.run))["config"]["init_from"]
        like = Path(began) if began is not None and is_hf_folder(Path(began)) else None
    export_hf(model, args.out, like=like, dtype=getattr(torch, args.dtype))
    print(f"model {args.out}")
    return 0


def score_verb(argv: Sequence[str]) -> int:
    parser = _parser(
        "score",
        "Write the loss of a trained model on each domain (nats a token), or the one it will have after more tokens, "
        "as a file for the policies' reference_losses and target_losses.",
    )
    parser.add_argument("run", type=Path, help="a run's folder, or a checkpoint in it")
    parser.add_argument("data", nargs="?", help="the domains: a manifest.json or a folder of shards")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--split", choices=["train", "held_out"], default="train", help="of the data")
    parser.add_argument("--windows", type=int, default=256, help="windows of a domain, 0 for all; default 256")
    parser.add_argument("--batch_size", type=int, default=16, help="windows at a time")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--seed", type=int, default=0, help="of the training windows that are taken")
    parser.add_argument(
        "--at_tokens", type=float, help="instead: extrapolate the run's held-out losses to so many tokens of training"
    )
    parser.add_argument("--from_tokens", type=float, default=0, help="with --at_tokens: leave out earlier losses")
    _add_root(parser)
    args = parser.parse_args(argv)
    if args.windows < 0:
        raise ConfigError(f"--windows is {args.windows}; expected 0 or more")
    if (args.data is None) == (args.at_tokens is None):
        raise ConfigError("expected either data to score or --at_tokens to extrapolate to, and not both")
    losses = _extrapolated(args) if args.data is None else _scored(args)
    for name, (loss, error, what) in losses.items():
        print(f"{name:<24}{loss:>10.4f}   {what} {error:.4f}")
    print(f"losses {args.out}")
    return 0


def _scored(args: argparse.Namespace) -> dict[str, tuple[float, float, str]]:
    from mixloader.manifest import Manifest
    from mixloader.scorer import score_domains, write_losses
    from mixloader.train.checkpoint import load_model
    from mixloader.train.trainer import resolve_device

    device, manifest = resolve_device(args.device), Manifest.open(args.data, roots=args.root)
    model = load_model(args.run)
    scores = score_domains(
        model.to(device),
        manifest,
        seq_len=model.seq_len,
        split=args.split,
        windows_per_domain=args.windows or None,
        batch_size=args.batch_size,
        vocab_size=model.vocab_size,
        seed=args.seed,
        device=device,
    )
    write_losses(args.out, scores, model=str(args.run), manifest=manifest.fingerprint, split=args.split)
    return {name: (score.loss, score.standard_error, "standard error") for name, score in scores.items()}


def _extrapolated(args: argparse.Namespace) -> dict[str, tuple[float, float, str]]:
    from dataclasses import asdict

    from mixloader.scaling_law import fit_scaling_laws, points_of_run
    from mixloader.scorer import write_losses

    laws = fit_scaling_laws(points_of_run(args.run, args.from_tokens))
    losses = {name: {"loss": law(args.at_tokens), "law": asdict(law)} for name, law in laws.items()}
    write_losses(args.out, losses, run=str(args.run), at_tokens=args.at_tokens)
    return {name: (law(args.at_tokens), law.error, "error of the fit") for name, law in laws.items()}


def report_verb(argv: Sequence[str]) -> int:
    from mixloader.report import main as report

    return report(list(argv))


def mixtures_verb(argv: Sequence[str]) -> int:
    from mixloader.fitters.command import mixtures_main

    return mixtures_main(list(argv))


def fit_verb(argv: Sequence[str]) -> int:
    from mixloader.fitters.command import fit_main

    return fit_main(list(argv))


def collect_verb(argv: Sequence[str]) -> int:
    from mixloader.agent.collect import main as collect

    return collect(list(argv))


def fit_agent_verb(argv: Sequence[str]) -> int:
    from mixloader.agent.fit_agent import main as fit

    return fit(list(argv))


def _add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", action="append", default=[], metavar="PATH", help="a folder or URL that shards may lie in"
    )


def _named_paths(pairs: Sequence[str]) -> dict[str, str]:
    """{name: path} of arguments name=path."""
    paths: dict[str, str] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not name or not equals or name in paths:
            raise ConfigError(f"{pair!r} is no new name=path; give every domain once, as name=path")
        paths[name] = path
    return paths


def _fields(domains: Iterable[str], targets: Sequence[str]) -> dict[str, str | None]:
    """The field of each domain; none without targets."""
    for name in targets:
        if name not in domains:
            raise ConfigError(f"--target {name} is no domain; the domains are {', '.join(domains)}")
    return {name: "target" if name in targets else "source" for name in domains} if targets else {}


def _print_domains(manifest: Manifest) -> None:
    for domain in manifest.domains:
        held_out = sum(shard.tokens for shard in domain.validation)
        counts = [shard.document_count for shard in domain.shards]
        documents = "" if None in counts else f"{sum(c or 0 for c in counts):>12,} documents"
        print(f"{domain.name:<24}{domain.tokens:>14,} tokens{documents}{held_out:>12,} held out   {domain.field or ''}")


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"python -m mixloader {verb}", description=description, allow_abbrev=False)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train_verb,
    "compare": compare_verb,
    "demo": demo_verb,
    "pack": pack_verb,
    "index": index_verb,
    "verify": verify_verb,
    "replay": replay_verb,
    "locate": locate_verb,
    "export": export_verb,
    "score": score_verb,
    "report": report_verb,
    "mixtures": mixtures_verb,
    "fit": fit_verb,
    "collect": collect_verb,
    "fit-agent": fit_agent_verb,
}
