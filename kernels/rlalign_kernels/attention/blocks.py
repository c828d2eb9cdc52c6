"""Lengths of query and key tiles, by backend and row length. Each row says where it comes from."""

# (least row length, block_q, block_k), longest rows first.
BLOCKS = {
    # Two AMD EPYC cores, jax 0.10.2: a tile of scores stays in a core's cache, and short rows hold short trees, of
    # which a smaller tile computes less that nobody sees.
    "xla": ((256, 64, 64), (33, 32, 32), (1, 16, 16)),
}


def blocks(backend: str, length: int) -> tuple[int, int]:
    """(block_q, block_k) for rows of `length` tokens: powers of two."""
    return next((q, k) for least, q, k in BLOCKS[backend] if length >= least or least == 1)
