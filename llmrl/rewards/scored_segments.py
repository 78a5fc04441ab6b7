"""Rollouts of several turns as scored segments (`llmrl.data.segment_formats`), for methods that compare behaviour."""

from typing import Any

from llmrl.rollout.trajectory import Rollout, RolloutGroup


def segments_row(group: RolloutGroup) -> dict[str, Any] | None:
    """The rollouts of one prompt as a row, each from its opening on, with its reward as its score.

    None where fewer than two have a reward. What was said after the policy's last turn is left out, for the policy did
    nothing there; a last turn that a limit cut off gets no stop token. Rows of one prompt may be compared by rewards;
    segments of different prompts want advantages instead.
    """
    segments = [_segment(rollout) for rollout in group.rollouts if rollout.reward is not None and rollout.num_sampled]
    beside = {name: value for name, value in group.row.items() if name not in ("prompt", "segments")}
    return {**beside, "segments": segments} if len(segments) > 1 else None


def _segment(rollout: Rollout) -> dict[str, Any]:
    said = rollout.messages[rollout.opening :]
    last = max(index for index, message in enumerate(said) if message["role"] == "assistant")
    assert rollout.reward is not None
    return {
        "prompt": rollout.messages[: rollout.opening],
        "completion": said[: last + 1],
        "score": rollout.reward + rollout.penalty,
        "ends": rollout.ends_in_stop,
    }
