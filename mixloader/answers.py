"""How likely a model finds gold answers: feedback from probe files of questions.

A probe file is JSON lines, each with a prompt and its answer, as text or as token ids, and perhaps the choices among
which the answer is to be found:

    {"prompt": "Q: 2 + 2 =", "answer": " 4", "choices": [" 3", " 4"]}
    {"prompt_ids": [17, 4, 99], "answer_ids": [5, 8], "choice_ids": [[5, 8], [6]]}

Prompt and answer are tokenized apart, without special tokens, so the space between them belongs to one of them (to
the answer, for the byte-level tokenizers of most models).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mixloader.batch import IGNORED
from mixloader.errors import ProbeError
from mixloader.evaluate import evaluating, logits_of
from mixloader.layout import check_counts
from mixloader.loss import domain_cross_entropy

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Probe:
    """One question in token ids. choices: of the answers, one of which is the gold one; empty if none are given."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    place: str


@dataclass(frozen=True)
class AnswerScore:
    """What a model makes of the answers of a probe file.

    loss: nats a token, the mean over answers of each one's mean negative log-likelihood (its negative is the feedback
        of the Data Mixing Agent, arXiv 2507.15640); standard_error: of that mean, NaN for a single answer.
    answers, tokens: gold answers, and tokens in them.
    accuracy: share of the `choices` questions in which no other choice is likelier than the gold answer, all its tokens
        taken together; NaN if no question has choices.
    """

    loss: float
    standard_error: float
    answers: int
    tokens: int
    accuracy: float
    choices: int


class Answers:
    """The questions of a probe file, read and checked, to be scored as often as one likes.

    path: JSON lines as above; empty lines are left out. seq_len: the longest input of the model.
    tokenizer: a tokenizers.Tokenizer, needed where there is text. vocab_size: ids at or above it are an error.
    eot: id to begin with where a prompt is empty, as a model cannot say how likely a first token is.

    Where prompt and answer are longer than seq_len + 1 tokens, the beginning of the prompt is left out.
    Raises ProbeError, with file and line, for what is no question: no answer, ids outside the vocabulary, an answer
    that is none of the choices, one that does not fit with a token of its prompt.
    """

    def __init__(
        self,
        path: str | Path,
        seq_len: int,
        *,
        tokenizer: Tokenizer | None = None,
        vocab_size: int | None = None,
        eot: int | None = None,
    ):
        check_counts(seq_len=(seq_len, 1))
        self.path, self.seq_len = Path(path), seq_len
        reader = _Reader(tokenizer, vocab_size, eot, seq_len)
        self.probes = [reader.read(line, place) for line, place in _lines(self.path)]
        if not self.probes:
            raise ProbeError(f"{self.path} holds no question; expected lines of JSON with a prompt and an answer")

    def __len__(self) -> int:
        return len(self.probes)

    def score(self, model: nn.Module, *, batch_size: int = 16, device: torch.device | str = "cpu") -> AnswerScore:
        """Score a causal model from input_ids int64 [b, T] to logits [b, T, V], or to an output with `.logits`.

        The model is in `eval()` mode meanwhile, and no statistics are counted; autocast is the caller's choice.
        """
        asked: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
        for probe in self.probes:
            asked.update(dict.fromkeys(((probe.prompt, answer) for answer in (probe.answer, *probe.choices)), 0.0))
        # Long ones first: rows of a batch are padded little, and memory is short at once or never.
        order = sorted(asked, key=lambda pair: -len(pair[0]) - len(pair[1]))
        with evaluating(model):
            for first in range(0, len(order), batch_size):
                part = order[first : first + batch_size]
                asked.update(zip(part, _log_likelihoods(model, part, self.seq_len, device), strict=True))
        return self._summary(asked)

    def _summary(self, found: Mapping[Any, float]) -> AnswerScore:
        """found: log-likelihood in nats, by (prompt, answer)."""
        losses = [-found[probe.prompt, probe.answer] / len(probe.answer) for probe in self.probes]
        mean, n = math.fsum(losses) / len(losses), len(losses)
        variance = math.fsum((loss - mean) ** 2 for loss in losses) / (n - 1) if n > 1 else math.nan
        chosen = [
            found[probe.prompt, probe.answer] >= max(found[probe.prompt, choice] for choice in probe.choices)
            for probe in self.probes
            if probe.choices
        ]
        return AnswerScore(
            loss=mean,
            standard_error=math.sqrt(variance / n),
            answers=n,
            tokens=sum(len(probe.answer) for probe in self.probes),
            accuracy=sum(chosen) / len(chosen) if chosen else math.nan,
            choices=len(chosen),
        )


@torch.no_grad()
def _log_likelihoods(
    model: nn.Module, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], seq_len: int, device: torch.device | str
) -> list[float]:
    """Nats, of the answer of each (prompt, answer) after its prompt."""
    rows = [[*prompt, *answer][-seq_len - 1 :] for prompt, answer in pairs]
    length = max(map(len, rows)) - 1
    inputs = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    for i, (row, (_, answer)) in enumerate(zip(rows, pairs, strict=True)):
        inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
        targets[i, len(row) - 1 - len(answer) : len(row) - 1] = torch.tensor(answer)
    # The model is causal, so what pads a row on the right does not change what stands before.
    logits = logits_of(model, inputs.to(device, non_blocking=True))
    losses = domain_cross_entropy(logits, targets.to(device, non_blocking=True), ignore_index=IGNORED, reduction="none")
    return (-losses.double().sum(dim=1)).tolist()


class _Reader:
    """Lines to probes."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int | None, eot: int | None, seq_len: int):
        self.tokenizer, self.vocab_size, self.eot, self.seq_len = tokenizer, vocab_size, eot, seq_len

    def read(self, line: Any, place: str) -> Probe:
        if not isinstance(line, dict):
            raise ProbeError(f"{place} is {_short(line)}; expected an object with a prompt and an answer")
        prompt = self._ids(line, "prompt", place)
        if not prompt:
            if self.eot is None:
                raise ProbeError(f"{place} has an empty prompt; give one, or `eot` to begin with")
            prompt = (self.eot,)
        answer = self._ids(line, "answer", place)
        choices = self._choices(line, place)
        for ids in (answer, *choices):
            if not ids:
                raise ProbeError(f"{place} has an empty answer or choice; expected at least one token")
            if len(ids) > self.seq_len:
                raise ProbeError(
                    f"{place} has an answer of {len(ids)} tokens, which do not fit into seq_len = {self.seq_len} after "
                    "a token of the prompt; shorten it or leave the question out"
                )
        if choices and (answer not in choices or len(set(choices)) < len(choices)):
            raise ProbeError(f"{place}: its answer is none of its choices, or two are the same; expected it among them")
        return Probe(prompt, answer, choices, place)

    def _ids(self, line: dict[str, Any], key: str, place: str) -> tuple[int, ...]:
        if (key in line) == (f"{key}_ids" in line):
            raise ProbeError(f"{place} has both or neither of {key!r} and '{key}_ids'; expected one of them")
        return self._tokens(line[key], key, place) if key in line else self._checked(line[f"{key}_ids"], place)

    def _choices(self, line: dict[str, Any], place: str) -> tuple[tuple[int, ...], ...]:
        key = "choice_ids" if "choice_ids" in line else "choices"
        choices = line.get(key, [])
        if not isinstance(choices, list) or len(choices) == 1 or ("choices" in line and "choice_ids" in line):
            raise ProbeError(f"{place} has {key} {_short(choices)}; expected a list of two or more, of text or of ids")
        if key == "choice_ids":
            return tuple(self._checked(choice, place) for choice in choices)
        return tuple(self._tokens(choice, "choice", place) for choice in choices)

    def _tokens(self, text: Any, key: str, place: str) -> tuple[int, ...]:
        if not isinstance(text, str):
            raise ProbeError(f"{place} has a {key} that is no text: {_short(text)}")
        if self.tokenizer is None:
            raise ProbeError(f"{place} has text, but no tokenizer was given; give one, or ids as '{key}_ids'")
        return self._checked(self.tokenizer.encode(text, add_special_tokens=False).ids, place)

    def _checked(self, ids: Any, place: str) -> tuple[int, ...]:
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ProbeError(f"{place} has ids {_short(ids)}; expected a list of whole numbers")
        limit = math.inf if self.vocab_size is None else self.vocab_size
        for token in ids:
            if not 0 <= token < limit:
                raise ProbeError(f"{place} has token {token}; expected ids of at least 0 and below {limit}")
        return tuple(ids)


def _lines(path: Path) -> list[tuple[Any, str]]:
    """The JSON of each line that is not empty, and where it stands."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(f"cannot read the probe file {path}: {error}; expected lines of JSON in UTF-8") from error
    found = []
    for number, line in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        if line.strip():
            try:
                found.append((json.loads(line), place))
            except ValueError as error:
                raise ProbeError(f"{place} is no JSON: {error}") from error
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
