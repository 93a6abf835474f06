"""Typed errors. Each message says what was found, where, what was expected and what to do."""


class MixLoaderError(Exception):
    """Base of every error that mixloader raises on purpose."""


class ManifestError(MixLoaderError, ValueError):
    """A manifest, or a folder used as one, that cannot be used as it is."""


class ShardError(MixLoaderError, OSError):
    """A shard that is missing, truncated, damaged or not what its manifest says."""


class TokenError(ShardError):
    """A token id outside the vocabulary."""


class WeightsError(MixLoaderError, ValueError):
    """Mixture weights that are not a mixture: NaN, negative, all zero, wrong length, unknown name."""


class StateError(MixLoaderError, ValueError):
    """A saved state that does not belong to this run."""


class ConfigError(MixLoaderError, ValueError):
    """A configuration with an unknown key or a value out of range."""


class RankError(MixLoaderError, RuntimeError):
    """Ranks that do not train the same run, or one that is gone. The message names the rank and what differs."""


class RecordError(MixLoaderError, ValueError):
    """A run record that cannot be read or does not belong to this data."""


class ProbeError(MixLoaderError, ValueError):
    """A probe file that holds something else than questions with answers."""


class FeedbackError(MixLoaderError, ValueError):
    """Results of an evaluation that no losses can be made of."""


class TableError(MixLoaderError, ValueError):
    """A CSV file of runs, losses or weights that cannot be read as one. The message names file, line and column."""


class PlacementError(MixLoaderError, TypeError):
    """A tensor that is spread over devices, given to an operation that needs the whole of it."""


class StatsError(MixLoaderError, ValueError):
    """Statistics of the loss that hold bad tokens or may have overflowed. `table` holds the sums nevertheless."""

    def __init__(self, message: str, table: object) -> None:
        super().__init__(message)
        self.table = table
