"""Attention of the newest token of every sample: api (entry, checks, the two sets of keys), parts (what forms share,
and the one formula that joins their results), xla (every platform), tpu and triton (Pallas), reference (the oracle)."""
