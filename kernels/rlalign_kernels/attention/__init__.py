"""Attention over a token forest: api (entry, checks), plan (live tiles), xla (every platform), reference (the oracle),
shapes (named shapes for tests and benchmarks)."""
