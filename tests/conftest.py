"""Set before any test module is imported: without a GPU, Triton kernels run in Triton's interpreter."""

import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A deadline for each example would make tests fail on a busy machine. Fixtures of ours hold no state of an example.
settings.register_profile("mixloader", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("mixloader")


@pytest.fixture(params=["torch", "cpu", "triton"])
def device(request, monkeypatch):
    """Send every loss of the test through one of the three paths; gives the device for its tensors."""
    from mixloader import loss_path, loss_torch

    if request.param == "torch":
        monkeypatch.setattr(loss_path, "path_of", lambda logits: loss_torch)
        return "cpu"
    if request.param == "cpu":
        return "cpu"  # where nothing else is asked for; float64 takes the torch path all the same
    pytest.importorskip("triton", reason="triton is not installed (pip install 'mixloader[triton]')")
    from mixloader.kernels import cross_entropy

    monkeypatch.setattr(loss_path, "path_of", lambda logits: cross_entropy)
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def fresh_compiler():
    """torch.compile remembers nothing of other tests, and they nothing of this one."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def ctrl_c():
    """SIGINT is a KeyboardInterrupt, also where a shell without job control started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
