"""The reference trainer: two small model families, one loop, exact resume."""
