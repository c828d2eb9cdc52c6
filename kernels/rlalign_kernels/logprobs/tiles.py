"""Sizes of chunks and tiles by backend. Each row says where it comes from."""

from typing import NamedTuple

from rlalign_kernels.tile import LANES


class Tile(NamedTuple):
    """Of a kernel: rows, tokens of the vocabulary, and bytes of a state that it multiplies at a time."""

    rows: int
    vocab: int
    bytes: int


# Elements of one chunk's [chunk, V], near which rows are a power of two. xla: float32 logits of 16 MiB, fastest of
# 2**20 to 2**26 on two AMD EPYC cores (jax 0.10.2). Kernels hold none in the forward; in the backward 2**29 are 1 GiB
# of bfloat16 gradients: each chunk reads and writes the head's float32 gradient, so few are better.
CHUNK = {"xla": 2**22, "tpu": 2**29, "triton": 2**29, "interpret": 2**11, "interpret_triton": 2**11}
MOST_ROWS = 4096

TILES = {
    "xla": Tile(8, 0, 0),
    # Not measured on hardware yet. 512 rows a head tile are 512 operations a byte of it, above the balance of v5e and
    # v5p (240, 166); that the tiles fit is make aot.
    "tpu": Tile(512, 512, 2048),
    # Not measured on hardware yet: a tile of products of 128 x 128 is what eight warps hold in registers; that it fits
    # into an H100's shared memory is make aot-cuda.
    "triton": Tile(128, 128, 128),
    "interpret": Tile(8, 128, 512),  # small, so that a test has many tiles
    "interpret_triton": Tile(16, 16, 128),
}


def chunk_rows(backend: str, vocab: int) -> int:
    """Rows of a chunk: a power of two from 64, or a tile's rows, to 4096, such that chunk x V is near CHUNK."""
    room = max(CHUNK[backend] // vocab, 1)
    return min(MOST_ROWS, max(64 if backend == "xla" else TILES[backend].rows, 1 << (room.bit_length() - 1)))


def width_tile(tile: Tile, width: int, itemsize: int) -> int:
    """Columns of a state multiplied at a time: all, or the largest whole share in lanes that tile.bytes hold."""
    most = tile.bytes // itemsize
    if width <= most:
        return width
    return next((w for w in range(most // LANES * LANES, 0, -LANES) if width % w == 0), width)
