"""Token shards as other programs write them, read in place: one format a file, registered in base.py."""

from mixloader.formats.base import WIDTHS, Documents, Extents, Shard, open_shard, read_tokens
from mixloader.formats.llmc import LLMC_HEADER, LLMC_MAGIC

__all__ = ["LLMC_HEADER", "LLMC_MAGIC", "WIDTHS", "Documents", "Extents", "Shard", "open_shard", "read_tokens"]
