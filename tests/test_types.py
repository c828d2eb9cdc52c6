"""What the pytrees do beside holding arrays: a prompt stands where its tokens can."""

import numpy as np

from rlalign.types import Prompt


def test_a_prompt_is_its_tokens_to_numpy():
    prompt = Prompt(id=3, tokens=np.array([2, 7, 1]))
    assert np.asarray(prompt) is prompt.tokens
    assert np.asarray(prompt, np.int8).dtype == np.int8
    copied = np.array(prompt)
    copied[0] = 9
    assert prompt.tokens.tolist() == [2, 7, 1]
