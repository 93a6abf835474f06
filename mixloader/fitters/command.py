"""`python -m mixloader mixtures` and `fit`: from a prior to runs to make, from the runs made to a mixture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mixloader import files
from mixloader.errors import ConfigError
from mixloader.fitters import FITTERS, GRIDS, Reuse, best_of, bounds, cross_validate, fit, propose, sample_mixtures
from mixloader.fitters.crossval import spearman
from mixloader.fitters.law import Law
from mixloader.fitters.mixmin import fit_mixmin
from mixloader.fitters.runs import (
    match,
    read_log_probs,
    read_losses,
    read_mixtures,
    read_weights,
    write_table,
    write_weights,
)
from mixloader.manifest import Manifest


def mixtures_main(argv: Sequence[str]) -> int:
    parser = _parser(
        "mixtures", "Sample mixtures around a prior, to train small runs on; `fit` reads what they end with."
    )
    parser.add_argument("out", type=Path, help="the CSV file to write: a run a line, a domain a column")
    parser.add_argument("-n", type=int, default=512, help="how many; 3 (domains + 1) at least for Olmix (default 512)")
    parser.add_argument("--temperature", type=float, default=0.5, help="exponent of the prior (default 0.5)")
    parser.add_argument("--min_strength", type=float, default=0.1, help="of the Dirichlet draws (default 0.1)")
    parser.add_argument("--max_strength", type=float, default=5.0, help="of the Dirichlet draws (default 5)")
    parser.add_argument("--max_usage", type=float, default=15.0, help="at most so many times the prior (default 15)")
    parser.add_argument("--grid", type=float, default=2e-4, help="weights are multiples of it (default 0.0002)")
    _add_domains(parser)
    args = parser.parse_args(argv)
    prior, tokens = _prior_and_tokens(args)
    names = tuple(prior)
    lower, upper = _bounds(args, names, tokens, floor=0.0)
    reuse = None if args.reuse is None else Reuse(names, read_amounts(args.reuse)[0], args.virtual)
    amounts = np.array([list(prior.values())])
    if reuse is not None:
        amounts = reuse.total(amounts)
        lower, upper = reuse.bounds(lower, upper)
    sampled = sample_mixtures(
        amounts[0], args.n, seed=args.seed, temperature=args.temperature, min_strength=args.min_strength,
        max_strength=args.max_strength, max_usage=args.max_usage, cap=upper, grid=args.grid,
    )  # fmt: skip
    write_table(args.out, "run", range(1, args.n + 1), names, sampled if reuse is None else reuse.expand(sampled))
    print(f"{args.n} mixtures of {len(names)} domains: {args.out}")
    return 0


def fit_main(argv: Sequence[str]) -> int:
    args = _fit_parser().parse_args(argv)
    if not (args.cv or args.predict or args.propose):
        raise ConfigError("nothing to do with the law; ask for --predict, --propose or --cv")
    if (args.predict is None) != (args.out is None) or (args.score and not args.predict):
        raise ConfigError("--predict MIXTURES and --out FILE go together, and --score with both")
    if args.method == "mixmin":
        domains, fields, law, reuse = _mixmin(args)
    else:
        domains, fields, law, reuse = _fitted(args)
    if args.predict is not None:
        _predict(args, law, domains, fields, reuse)
    if args.propose is not None:
        _propose(args, law, domains, fields, reuse)
    return 0


def read_amounts(path: str | Path) -> tuple[dict[str, float], dict[str, float] | None]:
    """Numbers by domain, and tokens by domain where the file has them.

    CSV with columns domain and weight; or JSON or YAML: {domain: number}, or Olmix's priors {"relative_sizes": {...},
    "token_counts": {...}}. Raises ConfigError or TableError for anything else.
    """
    path = Path(path)
    if path.suffix == ".csv":
        return read_weights(path), None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("priors"), dict):
        content = content["priors"]
    if isinstance(content, dict) and "relative_sizes" in content:
        tokens = content.get("token_counts")
        return _numbers(path, content["relative_sizes"]), None if tokens is None else _numbers(path, tokens)
    return _numbers(path, content), None


def _fit_parser() -> argparse.ArgumentParser:
    parser = _parser("fit", "Fit the losses of runs as a function of their mixtures; predict others, propose the best.")
    parser.add_argument("--method", required=True, choices=[*FITTERS, "mixmin"])
    parser.add_argument("--mixtures", type=Path, metavar="CSV", help="a run a line, a domain a column (RegMix, Olmix)")
    parser.add_argument("--losses", type=Path, metavar="CSV", help="a run a line, a loss a column; matched by run")
    parser.add_argument(
        "--log_probs", type=Path, metavar="CSV", help="mixmin: a text a line, a domain's model a column"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of the method, as preset=published for regmix"
    )
    parser.add_argument(
        "--cv", nargs="?", type=int, const=5, metavar="FOLDS", help="cross-validate; regmix: choose by it"
    )
    parser.add_argument("--predict", type=Path, metavar="CSV", help="mixtures to predict the losses of")
    parser.add_argument("--out", type=Path, metavar="CSV", help="where to write these losses")
    parser.add_argument("--score", type=Path, metavar="CSV", help="their real losses: print rank correlations")
    parser.add_argument("--propose", type=Path, metavar="FILE", help="write the best mixture (.json or .csv)")
    parser.add_argument(
        "--target", action="append", default=[], metavar="LOSS[=WEIGHT]", help="a column to lower (default: all alike)"
    )
    parser.add_argument("--kl", type=float, help="factor of KL(mixture || prior) (default: olmix 0.05, else 0)")
    parser.add_argument("--search", choices=["exact", "simulation"], help="default: exact where the law is convex")
    parser.add_argument("--draws", type=int, default=100_000, help="mixtures simulated (default 100000)")
    parser.add_argument("--best", type=int, default=128, help="of them, averaged (default 128)")
    parser.add_argument("--floor", type=float, default=0.0, help="least weight of every domain (default 0)")
    _add_domains(parser)
    return parser


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"python -m mixloader {verb}", description=description, allow_abbrev=False)


def _add_domains(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prior", type=Path, metavar="FILE", help="{domain: weight}: JSON, YAML, CSV, or Olmix's priors"
    )
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="{domain: tokens}, for the cap on repetition")
    parser.add_argument("--data", metavar="MANIFEST", help="in place of both: the tokens of these domains")
    parser.add_argument("--root", action="append", default=[], metavar="PATH", help="of --data: where shards may lie")
    parser.add_argument("--target_tokens", type=float, metavar="N", help="length of the run to come")
    parser.add_argument("--repetition", type=float, default=4.0, help="times a domain may be read in it (default 4)")
    parser.add_argument("--reuse", type=Path, metavar="FILE", help="{domain: weight} of domains that stay one (Olmix)")
    parser.add_argument("--virtual", default="existing", metavar="NAME", help="what that one is called")
    parser.add_argument("--seed", type=int, default=0)


def _fitted(args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[str, ...], Law, Reuse | None]:
    if args.mixtures is None or args.losses is None or args.log_probs is not None:
        raise ConfigError(f"method {args.method} is fitted to --mixtures and --losses")
    table, losses = read_mixtures(args.mixtures), read_losses(args.losses)
    x, y, runs = match(table, losses)
    left_out = len(table.runs) + len(losses.runs) - 2 * len(runs)
    domains, reuse = table.columns, None
    if args.reuse is not None:
        frozen = read_amounts(args.reuse)[0]
        if args.virtual in domains:  # the runs already have the frozen domains as one
            domains = (*frozen, *(name for name in domains if name != args.virtual))
            reuse = Reuse(domains, frozen, args.virtual)
            x = table.select(reuse.names)[[table.runs.index(run) for run in runs]]
        else:
            reuse = Reuse(domains, frozen, args.virtual)
            x = reuse.collapse(x)
    print(f"{len(runs)} runs, {x.shape[1]} domains, {y.shape[1]} losses" + f"; {left_out} unmatched" * bool(left_out))
    settings = _settings(args.set)
    if args.cv:
        settings = _cross_validated(args, x, y, losses.columns, settings)
    return domains, losses.columns, fit(args.method, x, y, seed=args.seed, **settings), reuse


def _mixmin(args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[str, ...], Law, Reuse | None]:
    if args.log_probs is None or args.mixtures or args.losses or args.cv or args.set or args.reuse:
        raise ConfigError("method mixmin takes --log_probs, and none of --mixtures, --losses, --cv, --set, --reuse")
    table, of = read_log_probs(args.log_probs)
    domains = tuple(column for column in table.columns if column != "length")
    lengths = table.select(["length"])[:, 0] if "length" in table.columns else None
    fields = tuple(dict.fromkeys(of))
    law = fit_mixmin(table.select(domains), lengths, fields=np.array([fields.index(field) for field in of]))
    return domains, fields, law, None


def _cross_validated(
    args: argparse.Namespace, x: np.ndarray, y: np.ndarray, fields: Sequence[str], settings: dict[str, Any]
) -> dict[str, Any]:
    """The settings with the best rank correlation out of fold, printed as they come."""
    targets = _targets(args.target, fields)
    grid = [{**choice, **settings} for choice in GRIDS.get(args.method, ({},))]
    scores = []
    chosen = np.flatnonzero(targets)
    print(f"Spearman out of fold ({args.cv} folds, mean of {len(chosen)} losses)")
    for score in cross_validate(FITTERS[args.method], x, y[:, chosen], grid, folds=args.cv, seed=args.seed):
        scores.append(score)
        print(f"{np.mean(score.spearman):.4f}  {json.dumps(score.settings)}", flush=True)
    return dict(best_of(scores, targets[chosen]).settings)


def _predict(
    args: argparse.Namespace, law: Law, domains: Sequence[str], fields: Sequence[str], reuse: Reuse | None
) -> None:
    table = read_mixtures(args.predict)
    if reuse is None:
        x = table.select(domains)
    elif reuse.names[0] in table.columns:
        x = table.select(reuse.names)
    else:
        x = reuse.collapse(table.select(domains))
    predicted = law.predict(x)
    write_table(args.out, table.run_column, table.runs, fields, predicted)
    print(f"{len(predicted)} mixtures predicted: {args.out}")
    if args.score is None:
        return
    losses = read_losses(args.score)
    ours, real, _ = match(replace(table, columns=tuple(fields), values=predicted), losses)
    correlations = {
        field: spearman(ours[:, f], real[:, losses.columns.index(field)])
        for f, field in enumerate(fields)
        if field in losses.columns
    }
    if not correlations:
        raise ConfigError(f"{args.score} has none of the losses {', '.join(fields)}")
    for field, correlation in correlations.items():
        print(f"Spearman {correlation:.4f}  {field}")
    print(f"Spearman {np.mean(list(correlations.values())):.4f}  mean")


def _propose(
    args: argparse.Namespace, law: Law, domains: Sequence[str], fields: Sequence[str], reuse: Reuse | None
) -> None:
    prior, tokens = _prior_and_tokens(args)
    start = np.array([_of_domains(prior, domains, "the prior")])
    lower, upper = _bounds(args, domains, tokens, args.floor)
    if reuse is not None:
        lower, upper = reuse.bounds(lower, upper)
        start = reuse.total(start)
    targets = _targets(args.target, fields)
    weights = propose(
        law, start[0], targets, floor=lower, cap=upper, kl=args.kl, search=args.search, draws=args.draws,
        best=args.best, seed=args.seed,
    )  # fmt: skip
    before, after = (law.predict(w[None] / w.sum()) for w in (start[0], weights))
    full = weights if reuse is None else reuse.expand(weights[None])[0]
    proposed = dict(zip(domains, full.tolist(), strict=True))
    if args.propose.suffix == ".csv":
        write_weights(args.propose, proposed)
    elif args.propose.suffix == ".json":
        files.replace(args.propose, json.dumps(proposed, indent=1) + "\n")
    else:
        raise ConfigError(f"--propose is {args.propose}; expected a name that ends in .json or .csv")
    shares = np.array(_of_domains(prior, domains, "the prior"))
    for name, share, weight in zip(domains, shares / shares.sum(), full, strict=True):
        print(f"{name:<40}{share:>9.4f} -> {weight:.4f}")
    scale = targets / np.abs(targets).sum()
    print(f"predicted loss {float(before[0] @ scale):.4f} -> {float(after[0] @ scale):.4f}\nmixture {args.propose}")


def _prior_and_tokens(args: argparse.Namespace) -> tuple[dict[str, float], dict[str, float] | None]:
    prior, tokens = (None, None) if args.prior is None else read_amounts(args.prior)
    if args.tokens is not None:
        tokens = read_amounts(args.tokens)[0]
    if args.data is not None:
        counted = {d.name: float(d.tokens) for d in Manifest.open(args.data, roots=args.root).domains}
        prior, tokens = prior or counted, tokens or counted
    if prior is None:
        raise ConfigError("mixtures are sought around a prior; give --prior FILE, or --data MANIFEST for its tokens")
    return prior, tokens


def _bounds(
    args: argparse.Namespace, names: Sequence[str], tokens: Mapping[str, float] | None, floor: float
) -> tuple[np.ndarray, np.ndarray]:
    if args.target_tokens is None:
        return bounds(len(names), floor=floor, names=names)
    if tokens is None:
        raise ConfigError(
            "--target_tokens caps repetition, for which --tokens FILE or --data MANIFEST must say what there is"
        )
    return bounds(
        len(names), floor=floor, names=names, tokens=_of_domains(tokens, names, "the tokens"),
        target_tokens=args.target_tokens, repetition=args.repetition,
    )  # fmt: skip


def _targets(given: Sequence[str], fields: Sequence[str]) -> np.ndarray:
    """float64 [F]."""
    weights = np.zeros(len(fields)) if given else np.ones(len(fields))
    for text in given:
        name, _, number = (text, "", "1") if text in fields else text.rpartition("=")
        if name not in fields:
            raise ConfigError(f"--target {text} is no loss; the losses are {', '.join(fields)}")
        try:
            weights[fields.index(name)] = float(number)
        except ValueError as error:
            raise ConfigError(f"--target {text}: {number!r} is no number") from error
    return weights


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: expected KEY=VALUE")
        settings[name] = _scalar(yaml.safe_load(value))
    return settings


def _of_domains(amounts: Mapping[str, float], domains: Sequence[str], what: str) -> list[float]:
    missing = [name for name in domains if name not in amounts]
    if missing:
        raise ConfigError(f"{what} says nothing of domain {missing[0]!r}; it has {', '.join(amounts)}")
    return [amounts[name] for name in domains]


def _numbers(path: Path, content: Any) -> dict[str, float]:
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{path} holds {type(content).__name__}; expected {{domain: number}}")
    numbers = {str(name): _scalar(value) for name, value in content.items()}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{path}: the number of domain {name!r} is {value!r}; expected a number")
    return {name: float(value) for name, value in numbers.items()}


def _scalar(value: Any) -> Any:
    """What YAML made of a value, but 1e6 is a number, as in JSON: YAML 1.1 wants 1.0e+6."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
