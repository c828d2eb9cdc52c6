"""TRL's own losses on given numbers: its trainers without their set-up, its models replaced by what they would return.

Settings go through TRL's configuration classes, so its defaults and its checks count. What runs between the numbers
that go in and those that come out is the installed package: from rewards to advantages, from log-probs to importance
weights, and the loss. Every function here is (settings, batch) -> (advantage or None, loss, gradient in the log-probs).
"""

import contextlib
import warnings
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

PAD, PROMPT, TOKEN, END = range(4)  # token ids; all that counts is whether a response ends and which rows are KTO's KL


@contextlib.contextmanager
def quiet():
    """What TRL and its libraries warn each other of is not for us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def float64():
    """TRL makes some tensors of its own, in the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        with quiet():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


class Given:
    """Stands for a model that is asked for log-probs only: these."""

    training = True
    is_gradient_checkpointing = False

    def __init__(self, logp=None):
        self.logp = logp


class Called(Given):
    """Stands for a model that is called: log-probs of the tokens that are labelled, 0 elsewhere."""

    def __call__(self, input_ids, **_):
        logp = self.logp[input_ids[0, 0].item()]
        zero = torch.zeros_like(logp)
        return SimpleNamespace(log_probs=logp, entropy=zero, mean_logits=zero, is_top1=zero.bool())


def bare(trainer, config, settings, **more):
    """A trainer that was never set up, with the attributes that its loss reads."""
    args = config(output_dir="nothing-is-written", use_cpu=True, bf16=False, report_to=[], **settings)
    made = object.__new__(trainer)
    vars(made).update(
        vars(args),
        args=args,
        accelerator=Accelerator(cpu=True),  # the configuration has just forgotten the last one's state
        model=Given(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    vars(made).update(more)
    return made


def grpo_trainer(settings, batch):
    rows, terms = batch["reward"].shape
    groups = len(np.unique(batch["group"]))
    made = bare(
        GRPOTrainer,
        GRPOConfig,
        {
            "num_generations": rows // groups,
            "per_device_train_batch_size": rows // settings.get("gradient_accumulation_steps", 1),
            **settings,
        },
        environments=None,
        environment_factories=None,
        tools=None,
        chat_template_kwargs={},
        state=SimpleNamespace(global_step=0),
        eos_token_ids=[END],
        reward_func_names=[f"reward_{k}" for k in range(terms)],
        reward_processing_classes=[None] * terms,
        _is_vlm=False,
        _tokenizer=SimpleNamespace(pad_token_id=PAD),
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _pending_extra_logs=defaultdict(list),
        _pending_metrics=defaultdict(list),
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda model, *_, **__: (model.logp, torch.zeros_like(model.logp), None),
    )
    args = made.args
    made.epsilon_low = args.epsilon
    made.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    made.reward_weights = torch.tensor(args.reward_weights or [1.0] * terms)
    made.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    return made


def after_generation(trainer, batch):
    """What TRL hands on to its loss: advantages, importance weights, masks, the number of tokens."""
    length = batch["length"]
    ids = [[TOKEN] * (n - 1) + [TOKEN if cut else END] for n, cut in zip(length, batch["truncated"], strict=True)]
    tools = [row[:n] for row, n in zip(batch["own"].astype(int).tolist(), length, strict=True)]
    sampled = [row[:n] for row, n in zip(batch["behaviour_logp"].tolist(), length, strict=True)]
    prompts, completions = [[PROMPT]] * len(ids), [""] * len(ids)
    trainer._generate = lambda _: (prompts, ids, tools, completions, sampled, {}, None, None)
    trainer.model, trainer.ref_model = (Given(torch.tensor(batch[k])) for k in ("old_logp", "ref_logp"))
    trainer.reward_funcs = [
        lambda column=column, **_: [r if ok else None for r, ok in zip(column, batch["valid"], strict=True)]
        for column in batch["reward"].T.tolist()
    ]
    inputs = trainer._generate_and_score_completions([{"prompt": ""}] * len(ids))
    inputs["old_per_token_logps"] = trainer.model.logp  # which TRL leaves out where the policy is still the old one
    return inputs


def grpo(settings, batch):
    """One step, its micro-batches added up."""
    with float64():
        trainer = grpo_trainer(settings, batch)
        inputs = after_generation(trainer, batch)
        logp = torch.tensor(batch["logp"], requires_grad=True)
        loss = torch.tensor(0.0)
        for rows in torch.arange(len(logp)).chunk(trainer.current_gradient_accumulation_steps):
            part = {k: v if k == "num_items_in_batch" else v[rows] for k, v in inputs.items()}
            loss = loss + trainer.compute_loss(Given(logp[rows]), part)
        loss.backward()
    return inputs["advantages"].numpy(), loss.item(), logp.grad.numpy()


def shown(mask, first):
    """Token ids, and where the response is among them; the first token is never predicted."""
    ids = torch.full((len(mask), mask.shape[1] + 1), first)
    return ids, torch.nn.functional.pad(torch.tensor(mask).long(), (1, 0))


def response(batch, key, mask="mask"):
    return torch.where(torch.tensor(batch[mask]), torch.tensor(batch[key]), 0)


def dpo(settings, batch):
    """Pairs: the first half of the rows is chosen, the second rejected."""
    with float64():
        trainer = bare(DPOTrainer, DPOConfig, settings)
        trainer.loss_types, trainer.loss_weights = trainer.args.loss_type, [1.0]
        logp = response(batch, "logp").requires_grad_()
        ids, completion = shown(batch["mask"], PROMPT)
        chosen, rejected = response(batch, "ref_logp").sum(1).chunk(2)
        loss = trainer.compute_loss(
            Called({PROMPT: logp}),
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "completion_mask": completion,
                "ref_chosen_logps": chosen,
                "ref_rejected_logps": rejected,
            },
        )
        loss.backward()
    return None, loss.item(), masked(logp.grad, batch)


def kto(settings, batch):
    """The KL is that of other responses, without gradient."""
    with float64():
        trainer = bare(KTOTrainer, KTOConfig, settings, calculate_KL=True)
        logp = response(batch, "logp").requires_grad_()
        ids, completion = shown(batch["mask"], PROMPT)
        other, other_completion = shown(batch["kl_mask"], TOKEN)
        loss = trainer.compute_loss(
            Called({PROMPT: logp, TOKEN: response(batch, "kl_logp", "kl_mask")}),
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "completion_mask": completion,
                "label": torch.tensor(batch["desirable"]),
                "ref_logps": response(batch, "ref_logp").sum(1),
                "KL_input_ids": other,
                "KL_attention_mask": torch.ones_like(other),
                "KL_completion_mask": other_completion,
                "ref_KL_logps": response(batch, "kl_ref_logp", "kl_mask").sum(1),
            },
        )
        loss.backward()
    return None, loss.item(), masked(logp.grad, batch)


def simpo(settings, batch):
    """Pairs, by their mean log-prob a token."""
    with float64():
        trainer = bare(CPOTrainer, CPOConfig, settings)
        logp = response(batch, "logp").requires_grad_()
        mean = logp.sum(1) / torch.tensor(batch["mask"]).sum(1)
        loss = trainer.cpo_loss(*mean.chunk(2))[0].mean()
        loss.backward()
    return None, loss.item(), masked(logp.grad, batch)


def masked(gradient, batch):
    """Padding is a model's business, not the loss's."""
    return np.where(batch["mask"], gradient.numpy(), 0)
