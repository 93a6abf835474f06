"""What torch.distributed.checkpoint saves of a run: loader, mixer and influence as one value."""

from __future__ import annotations

import json
from typing import Any

from mixloader.errors import StateError
from mixloader.loader import MixLoader
from mixloader.mixer import Mixer


class SavedRun:
    """Loader and mixer for dcp.save({"model": ..., "run": SavedRun(loader, mixer)}), and for dcp.load of the same.

    dcp reads back only what has the structure of the object that it loads into, and a list in a state may have grown;
    so the states go as one text of JSON, and the sketches of influence beside it, as tensors. All ranks take part,
    between mixer.step() and the next batch, on any number of ranks that the batch can be dealt to.
    """

    def __init__(self, loader: MixLoader, mixer: Mixer | None = None):
        self.loader, self.mixer = loader, mixer

    def state_dict(self) -> dict[str, Any]:
        """{"states": JSON, "influence": {name: tensor} if it is measured}. The same on every rank."""
        states = {
            "loader": self.loader.state_dict(),
            "mixer": None if self.mixer is None else self.mixer.state_dict(),
        }
        influence = None if self.mixer is None else self.mixer.influence
        return {
            "states": json.dumps(states),
            **({} if influence is None else {"influence": influence.state_dict()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where it was taken. Raises StateError as the parts do."""
        states = json.loads(state["states"])
        if (states["mixer"] is None) != (self.mixer is None):
            saved, here = ("none", "one") if states["mixer"] is None else ("one", "none")
            raise StateError(f"the run was saved with a mixer: {saved}, and is loaded into: {here}; make them alike")
        self.loader.load_state_dict(states["loader"])
        if self.mixer is not None:
            if self.mixer.influence is not None:
                self.mixer.influence.load_state_dict(state["influence"])
            self.mixer.load_state_dict(states["mixer"])
