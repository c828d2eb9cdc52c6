"""Folders that save_pretrained writes, read by transformers: PyTorch's logits and ours, in every family."""

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlalign.forest import pack
from rlalign.models import Decoder, add_reward_head, logits, save_pretrained
from rlalign.models.families import from_hugging_face
from rlalign.train import make_rewarder
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


@pytest.mark.parametrize("name", CASES)
def test_transformers_gives_a_reward_models_numbers(name, tmp_path):
    """The logit of its sequence classifier, at the last token of each of two rows."""
    base = Decoder(from_hugging_face(CASES[name], dtype="float32"))
    decoder, params = add_reward_head(base, random_params(base.config, scale=0.1), seed=1)
    save_pretrained(tmp_path, decoder, params)
    model, read = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(read.values()), read
    tokens = np.random.default_rng(0).integers(1, base.config.vocab_size, (4, 21))
    with torch.no_grad():  # one at a time: a batch needs a padding token, which these tiny configs lack
        theirs = np.array([model.eval()(torch.tensor(row[None])).logits.item() for row in tokens])
    packed = pack(list(tokens), row_length=42, response_start=[20] * 4)
    ours = make_rewarder(decoder)(params, packed)
    assert np.std(theirs) > 0.1
    np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
