"""How to sample, as data."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Settings of `sample`; part of what is compiled.

    Args:
      num_samples: G, responses a prompt.
      max_new_tokens: R.
      eos_ids: a response ends with one of these tokens; empty means it never does.
      temperature: of training and sampling; logits are divided by it.
      top_k: sample among the k largest logits; None for all.
      top_p: sample among the most likely tokens whose mass reaches p, after top_k; None for all.
      greedy: always the most likely token.
      gather_weights: on a mesh with fsdp, the weights are gathered once a rollout, so that each device holds 1 / tensor
        of them while it samples. False gathers each layer again at every token: slow, for models that do not fit so.

    Raises:
      ValueError: a setting out of range, with its value and the remedy.
    """

    num_samples: int
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False
    gather_weights: bool = True

    def __post_init__(self):
        object.__setattr__(self, "eos_ids", tuple(int(i) for i in self.eos_ids))
        if self.num_samples < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"num_samples and max_new_tokens must be at least 1, got {self.num_samples}, {self.max_new_tokens}"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be > 0, got {self.temperature}: use greedy=True for the likeliest token"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] or None, got {self.top_p}")
        if self.greedy and self.num_samples > 1:
            raise ValueError(
                f"greedy=True with num_samples={self.num_samples}: all samples of a group would be equal; use 1"
            )
