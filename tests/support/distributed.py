"""One update in each of however many ranks; rank 0 saves what came out. Used by tests/learner/test_sharding.py.

Settings: `model` and `out` (folders), pairs (how many), use_peft, tokens_per_microbatch, form, checkpointing, critic
(alone or beside the policy), methods (one update with each objective of groups), options (of the learner).
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.groups import VOCABULARY, random_pairs

from llmrl.config import ModelKeys
from llmrl.errors import RunFailedError
from llmrl.learner.learner import Learner
from llmrl.learner.loading import load_model
from llmrl.learner.options import LearnerOptions
from llmrl.learner.sequences import Group, completion
from llmrl.learner.sharding import build_accelerator
from llmrl.objectives.brain import BRAIn
from llmrl.objectives.cpl import CPL
from llmrl.objectives.direct_advantage import DirectAdvantage
from llmrl.objectives.dpo import DPO
from llmrl.objectives.policy_gradient import PolicyGradient
from llmrl.objectives.scored import Objective
from llmrl.objectives.value import ValueRegression
from llmrl.objectives.vpo import VPO


def build(settings: dict[str, Any]) -> Learner:
    accelerator = build_accelerator()
    if accelerator.state.deepspeed_plugin is not None:
        # ZeRO-3 would keep parameters below 100,000 elements whole, and all of this model's are.
        accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"][
            "stage3_param_persistence_threshold"
        ] = 0
    torch.manual_seed(1)
    keys = ModelKeys(model_name_or_path=str(settings["model"]), use_peft=settings.get("use_peft", False), lora_r=4)
    model = load_model(str(settings["model"]), keys, torch.float32, print)
    options = LearnerOptions(
        learning_rate=1e-2,
        total_steps=10,
        tokens_per_microbatch=settings.get("tokens_per_microbatch", 100),
        form=settings.get("form", "auto"),
        gradient_checkpointing=settings.get("checkpointing", False),
        reference="auto" if settings.get("use_peft") else "precomputed",
        most_skipped=2,
        **({"value_head": True, "value_learning_rate": 0.1, "weight_decay": 0.1} if settings.get("critic") else {}),
        **settings.get("options", {}),
    )
    return Learner(model, options, accelerator)


def captured_gradients(learner: Learner) -> dict[str, torch.Tensor]:
    """Whole gradients by name, as they stand before clipping and the optimizer's step."""
    gradients = {}
    for name, parameter in learner.causal_lm.named_parameters():
        if parameter.requires_grad:
            if hasattr(learner.backend, "engine"):
                from deepspeed.utils import safe_get_full_grad

                gradient = safe_get_full_grad(parameter)
            else:
                gradient = parameter.grad
            assert gradient is not None, name
            gradients[name] = gradient.detach().clone().float()
    return gradients


def skipping(learner: Learner, groups: list[Group]) -> dict[str, Any]:
    """What becomes of updates that are not finite: a loss whose gradient is sound, then a gradient on the last rank."""
    last = learner.accelerator.process_index == learner.accelerator.num_processes - 1
    infinite = Objective(lambda logprobs_N, scored: (logprobs_N.sum() + math.inf, {}))
    broken = Objective(lambda logprobs_N, scored: ((logprobs_N.sum() * 0).sqrt() if last else logprobs_N.sum(), {}))
    before = {name: tensor.clone() for name, tensor in learner.weights(bucket_bytes=4096)}
    skipped = [learner.update(groups, goal)["skipped_updates"] for goal in (infinite, broken)]
    kept = all([torch.equal(before[name], now) for name, now in learner.weights(bucket_bytes=4096)])  # ranks in step
    skipped += [learner.update(groups, goal)["skipped_updates"] for goal in (DPO().objective(), broken, broken)]
    try:
        learner.update(groups, broken)
        said = ""
    except RunFailedError as error:
        said = str(error)
    return {"skipped": skipped, "kept": kept, "said": said}


def whole_parameters(learner: Learner) -> dict[str, torch.Tensor]:
    if not hasattr(learner.backend, "engine"):
        return {name: parameter.detach().clone() for name, parameter in learner.policy.named_parameters()}
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).detach().clone() for name, p in learner.policy.named_parameters()}


def valued_pairs(weight: float) -> list[Group]:
    """Pairs with what a critic should say of their tokens, and what advantages they have."""
    targets = {"returns": weight, "old_values": weight, "advantages": 1.0}
    return [
        tuple(
            replace(s, token_values={name: np.full(s.num_scored, value, np.float32) for name, value in targets.items()})
            for s in pair
        )
        for pair in random_pairs(np.random.default_rng(3), 7)
    ]


def critic_alone(settings: dict[str, Any]) -> None:
    """Two updates of the value head alone; how far it and the language model have moved."""
    learner, groups = build(settings), valued_pairs(1.0)
    before = whole_parameters(learner)
    for _ in range(2):
        learner.update(groups, ValueRegression(None).objective(), language=False)
    moved = {name: float((now - before[name]).abs().max()) for name, now in whole_parameters(learner).items()}
    if learner.accelerator.is_main_process:
        Path(settings["out"]).mkdir(parents=True)
        (Path(settings["out"]) / "facts.json").write_text(json.dumps(moved))


def with_critic(settings: dict[str, Any]) -> None:
    """Updates of policy and critic together, both gradients far above the largest norm, the critic's by far; one of
    them is left out, for its value loss is infinite."""
    learner, out = build(settings), Path(settings["out"])
    goal = PolicyGradient(value_coef=1.0).objective()
    norms = [learner.update(valued_pairs(weight), goal)["grad_norm"] for weight in (100.0, 10.0, math.inf, 1.0)]
    weights = whole_parameters(learner)
    if learner.accelerator.is_main_process:
        out.mkdir(parents=True)
        torch.save({"weights": weights}, out / "result.pt")
        (out / "facts.json").write_text(json.dumps({"norms": norms}))


OBJECTIVES: dict[str, Objective] = {
    "vpo": VPO(calibration="samples").objective(),
    "cpl_kl": CPL(alpha=0.2, lam=0.75, reference=True, comparisons="dense").objective(),
    "brain": BRAIn().objective(),
    "direct_advantage": DirectAdvantage(beta=0.1).objective(),
}


def groups_of_samples(reference: bool) -> list[Group]:
    """Seven prompts with three samples and more each, with all that an objective of groups may ask for."""
    draw = np.random.default_rng(5)
    groups = []
    for number, (first, second) in enumerate(random_pairs(draw, 7)):
        prompt = first.token_ids[: len(first.token_ids) - first.num_scored]
        more = [completion(prompt, draw.integers(0, VOCABULARY, 6)) for _ in range(1 + number % 3)]
        groups.append(
            tuple(
                replace(
                    s,
                    values={name: float(draw.normal()) for name in ("reward", "score", "advantage")},
                    token_values={"old_logprobs": draw.normal(-4, 0.1, s.num_scored).astype(np.float32)},
                    reference_logprobs=np.full(s.num_scored, -4.0, np.float32) if reference else None,
                )
                for s in (first, second, *more)
            )
        )
    return groups


def each_method(settings: dict[str, Any]) -> None:
    """An update with every objective of groups, one after the other: gradients and losses by the method's name."""
    learner, out = build(settings), Path(settings["out"])
    groups = groups_of_samples(reference=learner.reference_kind == "precomputed")
    apply, gradients, losses, name = learner.backend.apply, {}, {}, ""

    def spied() -> float:
        gradients.update({f"{name} {key}": value for key, value in captured_gradients(learner).items()})
        return apply()

    learner.backend.apply = spied  # type: ignore[method-assign]
    for name, objective in OBJECTIVES.items():
        losses[name] = learner.update(groups, objective)["loss"]
    if learner.accelerator.is_main_process:
        out.mkdir(parents=True)
        torch.save({"gradients": gradients}, out / "result.pt")
        (out / "facts.json").write_text(json.dumps({"losses": losses}))


def run(settings: dict[str, Any]) -> None:
    if settings.get("methods"):
        return each_method(settings)
    if settings.get("critic"):
        return {"alone": critic_alone, "beside": with_critic}[settings["critic"]](settings)
    out = Path(settings["out"])
    learner = build(settings)
    # A parameter that ZeRO-3 has split is empty outside a forward or backward pass.
    split = all(parameter.numel() == 0 for parameter in learner.causal_lm.parameters())
    groups = random_pairs(np.random.default_rng(3), settings.get("pairs", 7))
    if learner.reference_kind == "precomputed":
        # A reference that is not the policy, so that the pairs weigh differently.
        groups = [
            tuple(replace(s, reference_logprobs=np.full(s.num_scored, -4.0, np.float32)) for s in g) for g in groups
        ]
    apply, gradients = learner.backend.apply, {}

    def spied() -> float:
        gradients.update(captured_gradients(learner))
        return apply()

    learner.backend.apply = spied  # type: ignore[method-assign]
    metrics = learner.update(groups, DPO().objective())
    learner.backend.apply = apply  # type: ignore[method-assign]
    folder = out / "state"
    if learner.accelerator.is_main_process:
        folder.mkdir(parents=True)
    learner.accelerator.wait_for_everyone()
    learner.save(folder)
    learner.update(groups, DPO().objective())
    straight = {name: tensor.clone() for name, tensor in learner.weights(bucket_bytes=4096)}
    learner.load(folder)
    learner.update(groups, DPO().objective())
    resumed = {name: tensor.clone() for name, tensor in learner.weights(bucket_bytes=4096)}
    exact = all(torch.equal(straight[name], resumed[name]) for name in straight)
    scored = learner.logprobs(groups)
    learner.export(out / "final")
    skips = skipping(learner, groups)
    if learner.accelerator.is_main_process:
        torch.save({"gradients": gradients, "weights": resumed, "logprobs": scored}, out / "result.pt")
        facts = {
            "metrics": metrics,
            "form": learner.form,
            "exact_resume": exact,
            "skips": skips,
            "split": split,
            "kind": type(learner.backend.model).__name__,
        }
        (out / "facts.json").write_text(json.dumps(facts))
