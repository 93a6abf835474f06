"""Token shards as other programs write them, read in place: one format a file, registered in opening.py."""

from mixloader.formats.base import WIDTHS, Documents, Extents, Shard, read_tokens, token_blocks
from mixloader.formats.llmc import LLMC_HEADER, LLMC_MAGIC
from mixloader.formats.opening import FORMATS, open_shard, open_shards

__all__ = [
    "FORMATS",
    "LLMC_HEADER",
    "LLMC_MAGIC",
    "WIDTHS",
    "Documents",
    "Extents",
    "Shard",
    "open_shard",
    "open_shards",
    "read_tokens",
    "token_blocks",
]
