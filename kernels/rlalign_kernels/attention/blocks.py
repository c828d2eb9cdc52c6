"""Lengths of query and key tiles, by backend and row length. Each row says where it comes from."""

# (least row length, block_q, block_k), longest rows first.
BLOCKS = {
    # Two AMD EPYC cores, jax 0.10.2: a tile of scores stays in a core's cache, and short rows hold short trees, of
    # which a smaller tile computes less that nobody sees.
    "xla": ((256, 64, 64), (33, 32, 32), (0, 16, 16)),
    # Not measured on hardware yet: 128 is the least that fills a register's lanes, and tiles of a forest that are
    # twice as long compute more that nobody sees; 256 keys halve the steps of a long prefix.
    "tpu": ((1024, 128, 256), (0, 128, 128)),
    # Not measured on hardware yet: what fits into an H100's shared memory for float32 heads of 128 too (make aot-cuda).
    "triton": ((0, 64, 64),),
    "interpret_triton": ((256, 64, 32), (0, 16, 16)),
    "interpret": ((256, 32, 64), (0, 16, 32)),  # small, so that a test has many tiles
}


def blocks(backend: str, length: int) -> tuple[int, int]:
    """(block_q, block_k) for rows of `length` tokens: powers of two."""
    return next((q, k) for least, q, k in BLOCKS[backend] if length >= least)
