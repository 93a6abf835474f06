"""Learners by name."""

from __future__ import annotations

from mixloader.agent.offline.cloning import AdvantageWeighted, BehaviourCloning
from mixloader.agent.offline.conservative import ConservativeQ
from mixloader.agent.offline.implicit import ImplicitQ
from mixloader.agent.offline.learner import Learner

LEARNERS: dict[str, type[Learner]] = {
    "bc": BehaviourCloning,
    "awr": AdvantageWeighted,
    "iql": ImplicitQ,
    "cql": ConservativeQ,
}
