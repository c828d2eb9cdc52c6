"""Models: a config.json as data, one decoder for all of them, weights from and to Hugging Face folders."""

from rlalign.models.config import LoraConfig, ModelConfig
from rlalign.models.decoder import Decoder, logits
from rlalign.models.export import save_pretrained
from rlalign.models.hub import download
from rlalign.models.lora import add_lora, merge_lora, without_lora
from rlalign.models.pretrained import load_pretrained
from rlalign.models.reward import add_reward_head
from rlalign.models.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Decoder",
    "LoraConfig",
    "ModelConfig",
    "Tokenizer",
    "add_lora",
    "add_reward_head",
    "download",
    "load_pretrained",
    "load_tokenizer",
    "logits",
    "merge_lora",
    "save_pretrained",
    "without_lora",
]
