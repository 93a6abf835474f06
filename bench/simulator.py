"""Steps a second of the agent's simulator on one thread: `python -m bench.simulator [--json FILE]`.

Episodes as in training, 48 decisions each. A step is one interval of one episode, with all of its domains.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from bench.common import arguments, in_turn, spread, write_json
from mixloader.agent.episodes import draw
from mixloader.agent.fit import measure_features, objective_cotangent, policy_gradient
from mixloader.agent.network import SetNetwork
from mixloader.agent.rollout import by_parameters, play
from mixloader.agent.signals import draw_signals
from mixloader.agent.simulator import pull_back, run

EPISODES, STEPS = 256, 48


def _measures() -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    network = SetNetwork()
    measure_features(network, rng, episodes=16)
    episodes, parameters = draw(EPISODES, rng), network.parameters_as_arrays()
    signals = draw_signals(episodes, STEPS, rng)
    stay = np.zeros(episodes.field.shape, dtype=np.float32)
    rollout = play(episodes, signals, STEPS, by_parameters(parameters), rng)
    cotangent = objective_cotangent(episodes, STEPS)

    def fit() -> None:
        drawn = draw(EPISODES, rng)
        made = play(drawn, draw_signals(drawn, STEPS, rng), STEPS, by_parameters(parameters), rng)
        policy_gradient(network, made, rng)

    return {
        "draw": lambda: draw(EPISODES, rng),
        "dynamics": lambda: run(episodes, rollout.weights),
        "adjoint": lambda: pull_back(episodes, rollout.weights, rollout.history, cotangent),
        "with signals and features": lambda: play(episodes, signals, STEPS, lambda *_: stay, rng),
        "with signals, features and the network": lambda: play(
            episodes, signals, STEPS, by_parameters(parameters), rng
        ),
        "fit": fit,
    }


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__ or "", "simulator").parse_args(argv)
    torch.set_num_threads(1)
    measures = _measures()

    def timed(measure: Callable[[], object]) -> Callable[[], float]:
        def once() -> float:
            begun = time.perf_counter()
            measure()
            return EPISODES * STEPS / (time.perf_counter() - begun)

        once()  # compiles
        return once

    found = in_turn({name: timed(measure) for name, measure in measures.items()}, args.rounds)
    rows = [{"measure": name, "steps_per_s": spread(values)} for name, values in found.items()]
    for name, values in found.items():
        print(f"{name:40} {np.median(values):12,.0f} steps/s   (best {max(values):,.0f})")
    write_json(args.json, rows, episodes=EPISODES, steps=STEPS)


if __name__ == "__main__":
    main()
