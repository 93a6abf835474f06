"""A policy that is given up on when it takes too long, whatever it is doing."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from mixloader.errors import MixLoaderError
from mixloader.observation import DomainTable, Observation
from mixloader.policies import Policy
from mixloader.policies.base import change_domains


class TimedPolicy:
    """A policy whose `decide` raises TimeoutError after `seconds`; the call goes on in a thread of its own.

    While it does, further decisions wait for their own `seconds` and are given up as well, without the policy seeing
    them, and its state is the one that it had before that call. The thread is a daemon: a policy that never returns
    holds up neither close() nor the end of the process.
    """

    def __init__(self, policy: Policy, seconds: float):
        self.policy, self.seconds = policy, seconds
        self.needs = policy.needs
        self._thread: threading.Thread | None = None
        self._before: dict[str, Any] = {}

    def reset(self, domains: DomainTable) -> np.ndarray | None:
        self._check_idle()
        return self.policy.reset(domains)

    def extend(self, domains: DomainTable) -> np.ndarray | None:
        self._check_idle()
        return change_domains(self.policy, domains)

    def decide(self, observation: Observation) -> np.ndarray | None:
        if not self._join():
            raise TimeoutError(f"no answer within {self.seconds:g} s: still at an earlier decision")
        self._before = self.policy.state_dict()
        answer: list[Any] = []
        self._thread = threading.Thread(
            target=self._run, args=(observation, answer), name="mixloader-timed-policy", daemon=True
        )
        self._thread.start()
        if not self._join():
            raise TimeoutError(f"no answer within {self.seconds:g} s")
        (outcome,) = answer
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def state_dict(self) -> dict[str, Any]:
        return self.policy.state_dict() if self._join() else self._before

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_idle()
        self.policy.load_state_dict(state)

    def close(self) -> None:
        """Wait for a call under way, for no longer than the deadline."""
        self._join()

    def _run(self, observation: Observation, answer: list[Any]) -> None:
        try:
            answer.append(self.policy.decide(observation))
        except BaseException as error:
            answer.append(error)

    def _check_idle(self) -> None:
        if not self._join():
            raise MixLoaderError(
                f"the policy has been at one decision for more than {self.seconds:g} s and cannot begin anew; "
                "resume the run in another process"
            )

    def _join(self) -> bool:
        """Wait for the call under way, if there is one; False if it takes too long."""
        if self._thread is None:
            return True
        self._thread.join(self.seconds)
        if self._thread.is_alive():
            return False
        self._thread = None
        return True
