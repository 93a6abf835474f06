"""mixloader: a token loader for language-model training that learns its own data mixture.

loader = MixLoader("data/", batch_size=12, seq_len=1024)
mixer = Mixer(loader, policy="agent")
for batch in loader:
    logits = model(batch["input_ids"])
    loss = domain_cross_entropy(logits, batch["targets"], batch["domain_ids"], stats=mixer.stats)
    ...
    mixer.step()
"""

from importlib.metadata import version as _version

from mixloader.answers import Answers
from mixloader.guards import Guards
from mixloader.influence import Influence
from mixloader.linear_loss import LinearDomainCrossEntropy, linear_domain_cross_entropy
from mixloader.loader import MixLoader
from mixloader.loss import DomainCrossEntropy, domain_cross_entropy
from mixloader.manifest import Manifest
from mixloader.mixer import Mixer
from mixloader.mixture import grouped
from mixloader.policies import Policy
from mixloader.record import read_record
from mixloader.replay import replay
from mixloader.schedule import Schedule
from mixloader.scorer import Reference
from mixloader.stats import DomainStats

__version__ = _version("mixloader")
__all__ = [
    "Answers",
    "DomainCrossEntropy",
    "DomainStats",
    "Guards",
    "Influence",
    "LinearDomainCrossEntropy",
    "Manifest",
    "MixLoader",
    "Mixer",
    "Policy",
    "Reference",
    "Schedule",
    "__version__",
    "domain_cross_entropy",
    "grouped",
    "linear_domain_cross_entropy",
    "read_record",
    "replay",
]
