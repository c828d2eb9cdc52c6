"""Folders that save_pretrained writes, read by transformers: PyTorch's logits and ours, in every family."""

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlalign.models import Decoder, logits, save_pretrained
from rlalign.models.families import from_hugging_face
from rlalign.types import TokenForest
from tests.models.record_logits import CASES
from tests.tiny import random_params


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_what_is_saved(name, tmp_path):
    """No tensor missing or left over, and logits within 2e-5: random weights in float32, no two layers alike."""
    config = from_hugging_face(CASES[name], dtype="float32")
    params = random_params(config, scale=0.1)
    save_pretrained(tmp_path, Decoder(config), params, shard_bytes=20_000)
    model, read = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(read.values()), read
    token = np.random.default_rng(0).integers(0, config.vocab_size, (2, 21))
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(token)).logits.numpy()
    column = np.broadcast_to(np.arange(21), token.shape)
    forest = TokenForest(token.astype(np.int32), column, column - 1, np.full(token.shape, 21))
    ours = jax.jit(logits, static_argnums=0)(Decoder(config), params, TokenForest(*(np.int32(x) for x in forest)))
    assert theirs.std() > 0.3  # not a comparison of zeros
    np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
