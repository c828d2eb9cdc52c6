"""A tokenizer's folder, made here, with chat templates that differ in what is hard about them."""

import json

import tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Drops what the assistant thought as soon as somebody answers, as Qwen3's does.
FORGETS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
QUESTION = [{"role": "user", "content": "What is 1 + 1?"}]
TALK = [
    *QUESTION,
    {"role": "assistant", "content": "<think>hm</think>2"},
    {"role": "user", "content": "Again."},
    {"role": "assistant", "content": "<think>hm</think>two"},
]


def save_tokenizer(folder, template=CHATML, **files):
    """A byte-level tokenizer whose merges join 'ab' and 'abc', and fields of its JSON files; returns `folder`."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate([*letters, "ab", "abc"])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(words, [("a", "b"), ("ab", "c")]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<|end|>", "<|im_start|>", "<|im_end|>"])
    # Added by its own rule to whatever is encoded, as Llama's BOS is: `encode` must leave it away.
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", bpe.token_to_id("<|end|>"))]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", chat_template=template)
    made.save_pretrained(folder)
    for name, value in files.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text() if path.exists() else "{}") | value))
    return folder
