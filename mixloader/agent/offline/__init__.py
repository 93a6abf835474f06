"""Offline reinforcement learning of the agent, from decisions of runs that are finished."""
