"""Trajectories: real runs as arrays, from which every observation that a policy was given comes back.

One is read from a run's record (docs/record.md), whoever ran it. What a record written without `record_detail` does
not have (deviations of losses, errors of influence) is NaN. Gradients' inner products (Observation.gram) and excess
losses are in no record.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mixloader.compare.cell import RESULT
from mixloader.errors import RecordError
from mixloader.mixture import WEIGHT_ONE
from mixloader.observation import DomainTable, Observation, Signal
from mixloader.record import RunRecord, read_record


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A run of T decisions on D domains.

    table: what the policy was reset with. windows: int64 [D], rows of one epoch of each domain.
    step, effect, tokens: int64 [T], as in Observation. rows_per_step, seq_len, token_budget (0: open): of the run.
    weights: float64 [T + 1, D], the mixture in force in each interval; row t + 1 is the answer to observation t.
    counts, loss, loss_std, loss_tokens: [T, D], since the last decision; rows, nats a token (NaN where nothing was
        read).
    feedback_names, feedback_step, feedback: N names, int64 [E] plan steps after which it was told, float64 [E, N] nats
        a token, NaN where not told.
    influence_fields: F names. influence_at: int64 [M], the decisions before which influence was measured anew;
        influence, influence_std: float64 [M, D, F]; influence_rows, influence_step: int64 [M, D]; probe_step: int64
        [M, F].
    held_out, held_out_tokens: float64 [K, D] nats a token on text that no policy is told of, at int64 [K] tokens of
        training, the first before any, the last at the end; K = 0 where it was not measured.
    probed: bool [D], domains whose held-out loss is among the feedback. preference: weight of the source field.
    meta: what else is known, JSON-able: behaviour, fold, architecture, model_size, seed, ...
    """

    table: DomainTable
    windows: np.ndarray
    step: np.ndarray
    effect: np.ndarray
    tokens: np.ndarray
    rows_per_step: int
    seq_len: int
    token_budget: int
    weights: np.ndarray
    counts: np.ndarray
    loss: np.ndarray
    loss_std: np.ndarray
    loss_tokens: np.ndarray
    feedback_names: tuple[str, ...]
    feedback_step: np.ndarray
    feedback: np.ndarray
    influence_fields: tuple[str, ...]
    influence_at: np.ndarray
    influence: np.ndarray
    influence_std: np.ndarray
    influence_rows: np.ndarray
    influence_step: np.ndarray
    probe_step: np.ndarray
    held_out: np.ndarray
    held_out_tokens: np.ndarray
    probed: np.ndarray
    preference: float
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.step)

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.seq_len

    @property
    def steps(self) -> int:
        """Plan steps of the run."""
        return int(self.step[-1]) + 1 if len(self) else 0

    @classmethod
    def from_record(
        cls,
        path: str | Path,
        *,
        held_out: Sequence[Mapping[str, Any]] = (),
        preference: float | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Trajectory:
        """The run of a record.

        held_out: [{"tokens": int, "losses": {domain: nats}}], if it was measured. preference: None takes that of the
        policy, or 0.5. Raises RecordError for a record that is none, that has no decision, or of an earlier mixloader,
        which does not say how large domains are; and for a run to which domains were added.
        """
        record = read_record(path)
        header, decisions = record.header, record.decisions
        missing = [key for key in ("tokens", "windows", "prior") if key not in header]
        grown = any(event["event"] == "domains" for event in record.events)
        if missing or not decisions or grown or header["step"] != 0:
            why = (
                f"its header does not say {missing[0]!r}, as an earlier mixloader wrote it" if missing
                else "it has no decision" if not decisions
                else "domains were added to the run" if grown
                else "it does not begin with the run"
            )  # fmt: skip
            raise RecordError(f"record {path} is no trajectory: {why}; take the record of another run")
        names = header["domains"]
        options = header["policy"]["options"]
        if preference is None:
            preference = float(options.get("preference", options.get("inner_options", {}).get("preference", 0.5)))
        table = DomainTable(
            tuple(names), tuple(header["fields"]), (None,) * len(names), np.array(header["tokens"], dtype=np.int64),
            np.array(header["prior"], dtype=np.float64) / WEIGHT_ONE,
        )  # fmt: skip
        feedback = _feedback(record)
        scored = _floats([[point["losses"].get(name) for name in names] for point in held_out])
        arrays: dict[str, Any] = {
            key: np.array([d[key] for d in decisions], dtype=np.int64)
            for key in ("step", "effect", "tokens", "counts", "loss_tokens")
        }
        return cls(
            table=table,
            windows=np.array(header["windows"], dtype=np.int64),
            **arrays,
            rows_per_step=header["global_batch"],
            seq_len=header["seq_len"],
            token_budget=header["token_budget"] or 0,
            weights=np.array([header["weights"], *(d["weights"] for d in decisions)], dtype=np.float64) / WEIGHT_ONE,
            loss=_floats([d["loss"] for d in decisions]),
            loss_std=_floats([d.get("loss_std", [None] * len(names)) for d in decisions]),
            **feedback,
            **_influence(record),
            held_out=scored.reshape(len(held_out), len(names)),
            held_out_tokens=np.array([point["tokens"] for point in held_out], dtype=np.int64),
            probed=np.isin(names, feedback["feedback_names"]),
            preference=preference,
            meta={"policy": header["policy"], "decide_every": header["decide_every"], "lag": header["lag"],
                  "seed": header["seed"], **dict(meta or {})},
        )  # fmt: skip

    @classmethod
    def from_episode(cls, folder: Path, **meta: Any) -> Trajectory:
        """The finished episode of a collection in this folder."""
        drawn = json.loads((folder / "episode.json").read_text(encoding="utf-8"))
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        about = {key: drawn[key] for key in ("number", "fold", "architecture", "base", "prior", "schedule")}
        about |= {"behaviour": drawn["behaviour"]["label"], "policy_errors": result["policy_errors"], **meta}
        return cls.from_record(
            folder / "record.jsonl", held_out=result["points"], preference=drawn["preference"], meta=about
        )

    def observations(self) -> Iterator[Observation]:
        """What the policy was given, a decision after the other, to the digits that are stored."""
        size = len(self.table)
        loss, loss_std = np.full(size, math.nan), np.full(size, math.nan)
        count, since = np.zeros(size, dtype=np.int64), np.full(size, -1, dtype=np.int64)
        seen = np.cumsum(self.counts, axis=0) * self.seq_len
        row = -1
        for t, step in enumerate(self.step.tolist()):
            new = self.loss_tokens[t] > 0
            loss, loss_std = np.where(new, self.loss[t], loss), np.where(new, self.loss_std[t], loss_std)
            count, since = np.where(new, self.loss_tokens[t], count), np.where(new, step, since)
            while row + 1 < len(self.influence_at) and self.influence_at[row + 1] <= t:
                row += 1
            tokens = int(self.tokens[t])
            yield Observation(
                step=step,
                effect_step=int(self.effect[t]),
                tokens=tokens,
                tokens_since=int(self.counts[t].sum()) * self.seq_len,
                progress=min(1.0, tokens / self.token_budget) if self.token_budget else math.nan,
                weights=self.weights[t].copy(),
                seen=seen[t].copy(),
                epochs=seen[t] / self.seq_len / self.windows,
                loss=Signal(loss.copy(), count.copy(), np.where(since < 0, -1, step - since)),
                loss_std=loss_std.copy(),
                feedback=self._feedback_at(step),
                **({} if row < 0 else self._influence_at(row, step)),
            )

    def _feedback_at(self, step: int) -> dict[str, Signal]:
        """The latest of what was told before the end of plan step `step`."""
        told: dict[str, Signal] = {}
        before = int(np.searchsorted(self.feedback_step, step))
        for n, name in enumerate(self.feedback_names):
            rows = np.flatnonzero(np.isfinite(self.feedback[:before, n]))
            if len(rows):
                age = step - self.feedback_step[rows[-1]]
                told[name] = Signal(np.array(self.feedback[rows[-1], n]), np.array(1), np.array(age))
        return told

    def _influence_at(self, row: int, step: int) -> dict[str, Any]:
        value = self.influence[row]
        since = np.minimum(self.influence_step[row][:, None], self.probe_step[row])
        count = np.broadcast_to(self.influence_rows[row][:, None], value.shape).copy()
        return {
            "influence": Signal(value.copy(), count, np.where(since < 0, -1, step - since)),
            "influence_std": self.influence_std[row].copy(),
            "influence_fields": self.influence_fields,
        }

    def rewards(self) -> np.ndarray:
        """float64 [T]: by how much the run's loss fell while the answer to each observation was in force, nats a token.

        The loss is preference * source + (1 - preference) * target, each the mean over the field's domains: feedback
        stands for those that it covers (for all, where it is told of the field alone), held-out losses for the others.
        Between two measurements it is taken to fall evenly with the tokens. The rewards add up to the fall between the
        first answer and the end. Raises RecordError if neither feedback nor held-out losses say how a field fared.
        """
        at = np.append(self.effect, self.steps).clip(max=self.steps) * self.tokens_per_step
        total = np.zeros(len(at))
        for name, part in (("source", self.preference), ("target", 1 - self.preference)):
            if part > 0:
                total += part * self._field_loss(name, at)
        return total[:-1] - total[1:]

    def _field_loss(self, name: str, at: np.ndarray) -> np.ndarray:
        of_field = np.array([field == name for field in self.table.fields])
        others, share = of_field & ~self.probed, 1.0
        if has_feedback := name in self.feedback_names:
            told = self.feedback[:, self.feedback_names.index(name)]
            known = np.isfinite(told)
            loss = np.interp(at, (self.feedback_step[known] + 1) * self.tokens_per_step, told[known])
            if not len(self.held_out) or not (of_field & self.probed).any() or not others.any():
                return loss
            share = float(others.sum() / of_field.sum())
        elif not len(self.held_out) or not of_field.any():
            raise RecordError(
                f"neither feedback nor held-out losses say how the {name} field fared in this run; evaluate it with "
                "feedback"
            )
        domains = others if has_feedback else of_field
        rest = np.interp(at, self.held_out_tokens, self.held_out[:, domains].mean(axis=1))
        return share * rest + (1 - share) * loss if has_feedback else rest

    def gain(self) -> float:
        """preference * source + (1 - preference) * target: how far the mean held-out loss of each field's domains,
        probed or not, has fallen over the run, in nats a token; NaN where it was not measured."""
        if len(self.held_out) < 2:
            return math.nan
        fall = self.held_out[0] - self.held_out[-1]
        fields = np.array(self.table.fields, dtype=object)
        means = {name: fall[fields == name].mean() if (fields == name).any() else 0.0 for name in ("source", "target")}
        return float(self.preference * means["source"] + (1 - self.preference) * means["target"])


def _floats(rows: Sequence[Sequence[Any]]) -> np.ndarray:
    """float64; None becomes NaN."""
    return np.array(rows, dtype=np.float64)


def _feedback(record: RunRecord) -> dict[str, Any]:
    """The events of a record that told feedback: the arguments of Trajectory for them."""
    events = [event for event in record.events if event["event"] == "feedback"]
    names = list(dict.fromkeys(name for event in events for name in event["losses"]))
    values = _floats([[event["losses"].get(name) for name in names] for event in events])
    return {
        "feedback_names": tuple(names),
        "feedback_step": np.array([event["step"] for event in events], dtype=np.int64),
        "feedback": values.reshape(len(events), len(names)),
    }


def _influence(record: RunRecord) -> dict[str, Any]:
    fields = tuple(record.header.get("influence", {}).get("fields", ()))
    shape = (len(record.header["domains"]), len(fields))
    told = [(t, d) for t, d in enumerate(record.decisions) if d.get("influence")]
    # Without detail, all that is known of age is that it was measured since the last decision.
    blank = {"influence_std": [[None] * shape[1]] * shape[0], "influence_rows": [0] * shape[0]}

    def floats(key: str) -> np.ndarray:
        return _floats([d.get(key, blank.get(key)) for _, d in told]).reshape(len(told), *shape)

    def whole(key: str, default: str | int, size: int) -> np.ndarray:
        values = [d.get(key, [d["step"] if default == "step" else default] * size) for _, d in told]
        return np.array(values, dtype=np.int64).reshape(len(told), size)

    return {
        "influence_fields": fields,
        "influence_at": np.array([t for t, _ in told], dtype=np.int64),
        "influence": floats("influence"),
        "influence_std": floats("influence_std"),
        "influence_rows": whole("influence_rows", 0, shape[0]),
        "influence_step": whole("influence_step", "step", shape[0]),
        "probe_step": whole("probe_step", "step", shape[1]),
    }
