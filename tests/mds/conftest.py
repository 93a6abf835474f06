"""Runs where mosaicml-streaming is installed: `make mds`.

streaming imports torchvision, of which the registry has a CUDA build only: beside a torch without CUDA its operators
are missing and it does not import. Tokens need nothing of it, so a stand-in with the names that streaming asks for
takes its place here where the real one fails.
"""

import importlib.util
import sys
from types import ModuleType

MISSING = importlib.util.find_spec("streaming") is None
collect_ignore_glob = ["test_*.py"] if MISSING else []

STAND_IN = {
    "torchvision": {"__version__": "0"},
    "torchvision.datasets": {"VisionDataset": object, "CIFAR10": object},
    "torchvision.transforms": {},
    "torchvision.transforms.functional": {"to_tensor": None},
}


def _put_stand_in() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left
    for name, attributes in STAND_IN.items():
        module = ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        vars(module).update(attributes, __path__=[])
        sys.modules[name] = module


if not MISSING:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # operator torchvision::nms does not exist
        _put_stand_in()
