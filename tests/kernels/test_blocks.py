"""The table of tiles: which row is whose, and that everybody who makes a plan asks the same row."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from rlalign.models.config import ModelConfig
from rlalign.models.decoder import Decoder
from rlalign.train.mesh import make_mesh, shard_decoder
from rlalign.types import TokenForest
from rlalign_kernels import attention_plan
from rlalign_kernels.attention import blocks
from rlalign_kernels.attention.blocks import ANY, ROWS, Row, Tile, tile_of
from rlalign_kernels.backend import BACKENDS, DTYPES, WIDTHS
from tests.tiny import SHAPE

HEAD = {"group": 4, "width": 128, "dtype": "bfloat16"}


def test_a_row_fits_every_head_and_no_row_is_out_of_reach():
    taken = set()
    for backend in BACKENDS:
        for length in (1, 33, 256, 1024):
            for width in WIDTHS:
                for dtype in DTYPES:
                    tile = tile_of(backend, length, group=8, width=width, dtype=dtype)
                    taken.add((backend, tile._replace(block_q=tile.block_q * tile.heads)))
                    for size in (tile.block_q, tile.block_k):
                        assert size >= 16
                        assert size & (size - 1) == 0
    assert taken == {(row.backend, row.tile) for row in ROWS}


@pytest.mark.parametrize(("group", "heads"), [(1, 1), (2, 2), (4, 4), (8, 4), (6, 2), (7, 1)])
def test_packed_heads_share_the_rows_of_one(group, heads):
    """As many as are a power of two and divide the group, so that the rows of a program stay the same."""
    alone = tile_of("triton", 1024, group=1, width=128, dtype="bfloat16")
    tile = tile_of("triton", 1024, group=group, width=128, dtype="bfloat16")
    assert tile == alone._replace(heads=heads, block_q=alone.block_q // heads)


def test_a_tile_of_a_tpu_holds_no_more_rows_than_fit():
    """The heads of a group lie in one tile: the more there are, the fewer queries each brings."""
    tiles = [tile_of("tpu", 4096, group=group, width=128, dtype="float32") for group in (1, 8, 16, 32, 128)]
    assert [(tile.block_q, tile.block_k) for tile in tiles] == [(128, 256), (128, 256), (64, 256), (32, 256), (16, 256)]


def test_tiles_of_the_platform_that_is_everywhere_do_not_depend_on_heads():
    for width, dtype, group in ((6, "float64", 1), (128, "bfloat16", 4), (300, "float32", 7)):
        for length, block in ((1, 16), (32, 16), (33, 32), (255, 32), (256, 64), (9999, 64)):
            tile = tile_of("xla", length, group=group, width=width, dtype=dtype)
            assert (tile.block_q, tile.block_k) == (block, block)


def test_wider_heads_and_numbers_get_smaller_tiles():
    area = [
        tile.block_q * tile.block_k
        for width, dtype in ((128, "bfloat16"), (256, "bfloat16"), (128, "float32"))
        for tile in [tile_of("triton", 1024, group=1, width=width, dtype=dtype)]
    ]
    assert area == sorted(area, reverse=True)
    assert len(set(area)) == 3


def test_a_row_of_a_device_is_for_that_device(monkeypatch):
    mine = Row("triton", "H100", 128, 2, 0, Tile(64, 32))
    monkeypatch.setattr(blocks, "ROWS", (mine, *ROWS))
    assert tile_of("triton", 1024, **HEAD) != mine.tile  # a CPU is at hand
    for kind, takes in (("NVIDIA H100 80GB HBM3", True), ("NVIDIA A100-SXM4-80GB", False)):
        device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            assert (tile_of("triton", 1024, **HEAD) == mine.tile) == takes
            assert tile_of("triton", 1024, **HEAD | {"dtype": "float32"}) != mine.tile


def test_the_default_plan_is_that_of_a_single_head_of_128_in_bfloat16():
    until = jnp.full((1, 300), 300, jnp.int32)
    plain, named = attention_plan(until), attention_plan(until, group=1, width=128, dtype="bfloat16")
    assert plain.block_q == named.block_q == 64


@pytest.mark.parametrize("backend", ["interpret", "interpret_triton"])
@pytest.mark.parametrize("mesh", [False, True])
def test_a_decoder_plans_for_its_own_heads(backend, mesh, monkeypatch):
    """Its tile lists are made before its queries are, with and without a mesh; a wrong one would be refused."""
    monkeypatch.setenv("RLALIGN_KERNELS", backend)
    rows = (Row(backend, "", 64, 4, 0, Tile(32, 16, 2)), Row(backend, "", ANY, ANY, 0, Tile(16, 16)))
    monkeypatch.setattr(blocks, "ROWS", rows)
    ids = jax.ShapeDtypeStruct((4, 40), jnp.int32)
    for dtype in DTYPES:
        decoder = Decoder(ModelConfig(**SHAPE, head_width=64, tied_head=True, dtype=dtype))
        params = jax.eval_shape(decoder.init, 0)
        decoder = shard_decoder(decoder, make_mesh(data=2, tensor=2) if mesh else None)
        hidden = jax.eval_shape(decoder.apply, params, TokenForest(ids, ids, ids, ids))
        assert hidden.shape == (4, 40, 16)
