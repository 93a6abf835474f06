"""Results of lm-evaluation-harness as feedback: losses of fields or domains, lower is better.

    mixer.feedback(lm_eval_feedback("results/", {"gsm8k": "target", "wikitext": "source", "hellaswag": "source"}))

Perplexities become nats (of a word, a byte, or what else the task counts), bits per byte become nats, and an accuracy
p becomes -ln p, the nats of being right. Policies look at how a loss moves, so its unit matters only where tasks of
one name are averaged. Nothing here needs lm_eval.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mixloader.errors import ConfigError, FeedbackError

# Which of a task's metrics is taken, the first that it has: likelihoods move before accuracies do.
_LIKELIHOODS: dict[str, Callable[[float], float]] = {
    "bits_per_byte": lambda bits: bits * math.log(2),
    "byte_perplexity": math.log,
    "word_perplexity": math.log,
    "perplexity": math.log,
}
_ACCURACIES = ("acc_norm", "acc", "exact_match", "em", "f1", "pass@1", "pass_at_1", "mc2", "mc1")


def lm_eval_feedback(
    results: Mapping[str, Any] | str | Path, tasks: Mapping[str, str | tuple[str, str]]
) -> dict[str, float]:
    """Losses by name, for Mixer.feedback.

    results: what lm_eval.simple_evaluate returns, its JSON file, or a folder of such files (--output_path), the latest
        of which is read.
    tasks: by task (or group), the name that its loss is for, "source", "target" or a domain's; or that name and the
        metric to take, with or without its filter: ("target", "exact_match,flexible-extract"). Tasks of one name are
        averaged.

    An accuracy over n questions counts as (right + 1/2) / (n + 1), so that 0 is no infinite loss.
    Raises FeedbackError if the results do not hold what is asked for.
    """
    if not tasks:
        raise ConfigError("no tasks are given; expected {task: 'source', 'target' or a domain}")
    values, where = _read(results)
    by_name: dict[str, list[float]] = {}
    for task, asked in tasks.items():
        name, metric = (asked, None) if isinstance(asked, str) else asked
        by_name.setdefault(name, []).append(_loss(values, task, metric, where))
    return {name: sum(losses) / len(losses) for name, losses in by_name.items()}


def _read(results: Mapping[str, Any] | str | Path) -> tuple[Mapping[str, Any], str]:
    """The results, and what to call them in an error."""
    if isinstance(results, Mapping):
        values, where = results, "the results"
    else:
        path = Path(results)
        if path.is_dir():
            # lm_eval writes results_<time>.json, into a folder of the model's name.
            found = sorted(path.rglob("results*.json"), key=lambda file: file.name)
            if not found:
                raise FeedbackError(f"{path} holds no results*.json; expected what lm_eval --output_path wrote")
            path = found[-1]
        try:
            values, where = json.loads(path.read_text(encoding="utf-8")), str(path)
        except (OSError, ValueError) as error:
            raise FeedbackError(f"cannot read {path}: {error}; expected a results file of lm_eval") from error
    if not isinstance(values, Mapping) or not isinstance(values.get("results"), Mapping):
        raise FeedbackError(f'{where} have no "results"; expected those of lm_eval, by task')
    return values, where


def _loss(values: Mapping[str, Any], task: str, metric: str | None, where: str) -> float:
    scores = values["results"].get(task)
    if not isinstance(scores, Mapping):
        raise FeedbackError(f"{where} have no task {task!r}; they have {', '.join(map(str, values['results']))}")
    for key in [metric] if metric is not None else [*_LIKELIHOODS, *_ACCURACIES]:
        # Without a filter any will do: a task mostly has one.
        names = [name for name in scores if name == key or name.partition(",")[0] == key]
        if names:
            kind = names[0].partition(",")[0]
            higher = (values.get("higher_is_better") or {}).get(task) or {}
            if kind not in _LIKELIHOODS and higher.get(kind) is False:
                raise FeedbackError(
                    f"{where}, {task}: {kind} is better the lower it is, and no perplexity; expected one of "
                    f"{', '.join(_LIKELIHOODS)}, or an accuracy"
                )
            return _as_loss(scores[names[0]], kind, _questions(values, task), f"{where}, {task}, {names[0]}")
    raise FeedbackError(
        f"{where} have no {metric or 'metric that is known'} for {task!r}; they have {', '.join(map(str, scores))}; "
        "name a likelihood or an accuracy among them: {task: (name, metric)}"
    )


def _as_loss(value: Any, kind: str, questions: int | None, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise FeedbackError(f"{where} is {value!r}; expected a finite number")
    if kind in _LIKELIHOODS:
        if value <= 0:
            raise FeedbackError(f"{where} is {value}; expected a number above 0")
        return _LIKELIHOODS[kind](value)
    if not 0 <= value <= 1:
        raise FeedbackError(f"{where} is {value}; expected an accuracy from 0 to 1")
    if questions is not None:
        value = (value * questions + 0.5) / (questions + 1)
    if value == 0:
        raise FeedbackError(f'{where} is 0 of unknown many; keep "n-samples" in the results, or leave the task out')
    return -math.log(value)


def _questions(values: Mapping[str, Any], task: str) -> int | None:
    """Of a task, or of all tasks of a group; None if the results do not say."""
    parts = (values.get("group_subtasks") or {}).get(task) or [task]
    samples = values.get("n-samples") or {}
    counts = [samples[part]["effective"] for part in parts if part in samples]
    return sum(counts) if len(counts) == len(parts) else None
