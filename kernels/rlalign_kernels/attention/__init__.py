"""Attention over a token forest: api (entry, checks, choice of backend), plan (live pairs of tiles), blocks (their
lengths), tiled (what backends share), xla (every platform), tpu and triton (Pallas), ring (rows cut
along their tokens), reference (the oracle), shapes (named shapes for tests and benchmarks)."""
