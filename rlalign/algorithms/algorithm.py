"""What an algorithm is: an advantage, a loss and defaults, as frozen data that is checked when it is built."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rlalign.losses import LINKS, density_ratio, importance_weight, policy_gradient
from rlalign.losses.policy import check_options

DATA = {
    "rollouts": "sampled by the policy, one reward a sample",
    "demonstrations": "responses to imitate",
    "pairs": "two responses to one prompt, the first the better",
    "labels": "responses that are good (Batch.advantage > 0) or bad",
}
# What an advantage may ask for besides reward, group, num_groups and valid; make_batch knows the first two itself.
NEEDS = {
    "mask": "b[N, R], the response tokens",
    "weight": "f[N], pi_ref / pi_old of each response: pass make_batch a reference",
    "baseline": "f[num_groups], the reward of each prompt's greedy response",
    "terms": "f[N, C], the reward's terms",
    "token_reward": "f[N, R], rewards of single tokens",
    "trajectory": "i[N], the trajectory of each step",
    "step": "i[N], the order of the steps of a trajectory",
    "anchor": "i[N], the state that each step was taken in (anchor_ids)",
    "past": "i[N, L], ids of that state with the last l before it, l = 0 to L - 1 (past_ids)",
    "penalty": "f[N], what an invalid action costs, 0 for others",
}
KL_KINDS = ("k1", "k2", "k3")
AGGREGATES = ("token", "sequence", "constant")


class About(NamedTuple):
    """What a reader needs to choose an algorithm; docs/algorithms.md is made from it."""

    formula: str
    source: str
    use: str
    cost: str
    trap: str


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """What distinguishes one objective from another.

    Args:
      advantage: (reward f[N], group i[N], *, num_groups, valid, and what `needs` names) -> f[N] or f[N, R]; None where
        no reward is used.
      loss: by `data`:
        rollouts        like policy_gradient(logp, old_logp, advantage, mask, *, weight, aggregate, max_length,
                        denominator)
        demonstrations  like negative_log_likelihood(logp, mask, *, aggregate, max_length, denominator)
        pairs           like dpo(better f[M], worse f[M], *, valid, denominator)
        labels          like kto(score f[N], desirable b[N], *, valid, denominator)
      data: what the batch holds; see DATA.
      score: what pairs and labels are judged by: "logratio" (to the reference, summed; needs ref_logp), "mean_logp", or
        for pairs "reward": the number that a reward model (add_reward_head) gives at their last token.
      needs: names of further arrays that `advantage` takes; see NEEDS.
      optional: names of arrays that it takes where the caller has them.
      grouped: whether the advantage compares the samples of a group, so that a group of one teaches nothing.
      drop_without_signal: groups whose advantages are all 0 leave the batch: they have no KL, no entropy term and no
        place in a denominator. By default they pull towards the reference, where there is one.
      correction: (logp, behaviour_logp, mask) -> (weight, metrics) between trainer and sampler; None is none.
      aggregate: how tokens become one number: "token", "sequence" or "constant"; handed to the loss, and used for the
        KL and entropy terms too.
      kl_coef: weight of the KL to the reference, in the loss; > 0 needs ref_logp.
      kl_kind: estimator of that KL: "k1", "k2" or "k3".
      entropy_coef: weight of the policy's entropy, nats a token, added to the objective.
      temperature: of the policy that is sampled and trained.
      max_length: response length that "constant" divides by; None takes the batch's R.
      about: for the page of algorithms; None for yours.

    Raises:
      ValueError: a combination that makes no sense, with its values and the reason.
    """

    advantage: Callable[..., Any] | None
    loss: Callable[..., Any]
    data: Literal["rollouts", "demonstrations", "pairs", "labels"] = "rollouts"
    score: Literal["logratio", "mean_logp", "reward"] = "logratio"
    needs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    grouped: bool = True
    drop_without_signal: bool = False
    correction: Callable[..., Any] | None = importance_weight
    aggregate: Literal["token", "sequence", "constant"] = "token"
    kl_coef: float = 0.0
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    temperature: float = 1.0
    max_length: int | None = None
    about: About | None = None

    def __post_init__(self):
        _one_of("data", self.data, DATA)
        _one_of("aggregate", self.aggregate, AGGREGATES)
        _one_of("kl_kind", self.kl_kind, KL_KINDS)
        _one_of("score", self.score, ("logratio", "mean_logp", "reward"))
        if self.score == "reward" and self.data != "pairs":
            raise ValueError(f"score='reward' with data={self.data!r}: reward models learn from pairs")
        for field in ("needs", "optional"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
            for name in getattr(self, field):
                _one_of(field, name, NEEDS)
        if (self.advantage is None) != (self.data != "rollouts"):
            raise ValueError(f"data={self.data!r} with advantage={self.advantage}: rollouts need one, others none")
        for name in ("kl_coef", "entropy_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be > 0, got {self.temperature}: greedy samples of a group are all equal"
            )
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")
        if self.kl_coef > 0 and self.data != "rollouts":
            raise ValueError(
                f"kl_coef={self.kl_coef} with data={self.data!r}: the KL is estimated from the policy's own samples; "
                "losses of pairs and labels hold the reference already"
            )
        if self.entropy_coef > 0 and self.data in ("pairs", "labels"):
            raise ValueError(
                f"entropy_coef={self.entropy_coef} with data={self.data!r}: the loss is a mean over responses, the "
                "entropy one over tokens of responses that the policy did not sample"
            )
        if self.needs and self.data != "rollouts":
            raise ValueError(f"needs={self.needs} with data={self.data!r}: there is no advantage that could take them")
        if isinstance(self.loss, functools.partial):
            _check_loss(self)
        _check_calls(self)

    @property
    def needs_reference(self) -> bool:
        """Whether a batch must hold ref_logp."""
        judged = self.data in ("pairs", "labels") and self.score == "logratio"
        return self.kl_coef > 0 or "weight" in self.needs or judged


def _one_of(name: str, value: str, known) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _check_loss(algorithm: Algorithm) -> None:
    """Options that would fail, or mean nothing, at the first step."""
    options = algorithm.loss.keywords  # pyright: ignore[reportFunctionMemberAccess]
    function = algorithm.loss.func  # pyright: ignore[reportFunctionMemberAccess]
    for name in ("aggregate", "max_length"):
        if name in options:
            raise ValueError(f"{name} belongs to the Algorithm, not to its loss: the KL and entropy terms use it too")
    for name in ("denominator", "weight", "valid", "kl_logratio", "kl_valid"):
        if name in options:
            raise ValueError(f"{name} comes from the batch: it cannot be an option of the loss")
    if function is density_ratio and isinstance(options.get("link"), str):
        _one_of("link", options["link"], LINKS)
    if function is not policy_gradient:
        return
    check_options(**{k: v for k, v in options.items() if k in ("clip", "clip_low", "clip_high", "dual_clip", "ratio")})
    ratio, clip = options.get("ratio", "token"), options.get("clip", "ppo")
    if ratio != "token" and clip == "cispo":
        raise ValueError(
            f"clip='cispo' with ratio={ratio!r}: CISPO weighs each token's log-prob by its own ratio; use ratio='token'"
        )
    if ratio == "product" and algorithm.aggregate == "token":
        raise ValueError(
            "ratio='product' with aggregate='token': one ratio a response would count once a token, so long responses "
            "would weigh more; use aggregate='sequence'"
        )
    if "token_reward" in algorithm.needs and ratio != "token":
        raise ValueError(f"token_reward with ratio={ratio!r}: advantages by token need the tokens' own ratios")


def _check_calls(algorithm: Algorithm) -> None:
    """That advantage and loss can be called as they will be; only names and counts, at no cost."""
    how = ("aggregate", "max_length", "denominator")
    arguments = {
        "rollouts": (("logp", "old_logp", "advantage", "mask"), ("weight", *how)),
        "demonstrations": (("logp", "mask"), how),
        "pairs": (("better", "worse"), ("valid", "denominator")),
        "labels": (("score", "desirable"), ("valid", "denominator")),
    }[algorithm.data]
    _bind("loss", algorithm.loss, f"data={algorithm.data!r}", *arguments)
    if algorithm.advantage is not None:
        names = ("group", "num_groups", "valid", *algorithm.needs, *algorithm.optional)
        _bind("advantage", algorithm.advantage, f"needs={algorithm.needs}", ("reward",), names)


def _bind(field: str, function: Callable, why: str, positional, names) -> None:
    try:
        inspect.signature(function).bind(*positional, **dict.fromkeys(names))
    except TypeError as error:
        name, given = getattr(function, "__name__", function), ", ".join((*positional, *names))
        raise ValueError(f"{field}={name} cannot be called with {given}, as {why} asks for: {error}") from None


SHAPES = {"i": jnp.int32, "f": jnp.float32, "b": jnp.bool_}


def try_out(algorithm: Algorithm) -> None:
    """Trace advantage and loss on empty shapes: wrong options, and code that JAX cannot trace, show before a rollout.

    Raises:
      ValueError: what they raise themselves, or an advantage that is not f[N] or f[N, R].
    """
    sizes = {"N": 4, "R": 2, "C": 3, "L": 3, "num_groups": 2, "M": 2}

    def array(spec: str) -> jax.ShapeDtypeStruct:
        kind, axes = spec.split("]")[0].split("[")
        return jax.ShapeDtypeStruct(tuple(sizes[a.strip()] for a in axes.split(",")), SHAPES[kind])

    token, score, mask, valid = (array(s) for s in ("f[N, R]", "f[N]", "b[N, R]", "b[N]"))
    how = {"aggregate": algorithm.aggregate, "max_length": algorithm.max_length or 2, "denominator": 4}
    if algorithm.advantage is not None:
        call = functools.partial(algorithm.advantage, num_groups=sizes["num_groups"])
        more = {name: array(NEEDS[name]) for name in algorithm.needs}
        if "terms" in more and hasattr(call, "keywords") and "term_weight" in call.keywords:
            sizes["C"] = len(call.keywords["term_weight"])
            more["terms"] = array(NEEDS["terms"])
        out = jax.eval_shape(call, score, group=array("i[N]"), valid=valid, **more)
        if not isinstance(out, jax.ShapeDtypeStruct) or out.shape not in (score.shape, token.shape):
            raise ValueError(f"advantage gave {out} for {score.shape} rewards: expected f[N] or f[N, R]")
        loss = functools.partial(algorithm.loss, **how)
        jax.eval_shape(lambda *args: loss(*args, weight=None), token, token, score, mask)
    elif algorithm.data == "demonstrations":
        jax.eval_shape(functools.partial(algorithm.loss, **how), token, mask)
    else:
        second = score if algorithm.data == "pairs" else valid
        jax.eval_shape(functools.partial(algorithm.loss, denominator=4), score, second, valid=valid)
