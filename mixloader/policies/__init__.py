"""Mixing policies, one family a file. Importing this package registers the static ones; others load when asked for."""

from mixloader.policies import static as _static  # noqa: F401
from mixloader.policies.base import Policy, make_policy, policy_names, register

__all__ = ["Policy", "make_policy", "policy_names", "register"]
