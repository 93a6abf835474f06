"""Adapters to trainers that people have already: a framework a file, imported only by whoever has it."""
