"""What was answered in the first and in the latest evaluation, side by side, for a person to read: samples.json.

It is a list of `{"evaluation", "row", "prompt", "answer", "completions": [{"label", "text", "correct" or "reward"},
...]}`, where a prompt and a text may be messages and not all have a row; the report shows it.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmrl.rollout.trajectory import RolloutGroup

Sample = dict[str, Any]
"""One prompt with its completions, whose label is not given yet."""


class KeptSamples:
    """The samples of one evaluation (`name`) in `file`, beside those of others.

    `begun`: the run goes on, so that the first evaluation that is to come is not its first.
    """

    def __init__(self, file: Path, name: str, begun: bool) -> None:
        self.file, self.name = file, name
        self.label = "after" if begun else "before"

    def keep(self, samples: Iterable[Sample]) -> None:
        """Put them into the file, the first time as `before`, then as `after`, in the place of the latest."""
        stored: list[Sample] = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else []
        others = [item for item in stored if item.get("evaluation") != self.name]
        earlier = {
            _key(item): [one for one in item["completions"] if one["label"] != self.label]
            for item in stored
            if item.get("evaluation") == self.name
        }
        mine = [
            {
                "evaluation": self.name,
                **sample,
                "completions": [
                    *earlier.get(_key(sample), []),
                    *({"label": self.label, **one} for one in sample["completions"]),
                ],
            }
            for sample in samples
        ]
        written = self.file.with_name(f".tmp_{self.file.name}")
        text = json.dumps([*others, *mine], ensure_ascii=False, indent=1, default=str)
        written.write_text(text + "\n", encoding="utf-8")
        written.replace(self.file)
        self.label = "after"


def _key(sample: Sample) -> str:
    return json.dumps([sample.get("row"), sample["prompt"]], default=str)


def samples_of(groups: Iterable[RolloutGroup]) -> list[Sample]:
    """Held-out rollouts: what each row asked, and what was said to it since, with its reward."""
    return [
        {
            "row": group.number,
            "prompt": group.rollouts[0].messages[: group.rollouts[0].opening],
            "answer": group.row.get("answer"),
            "completions": [{"text": r.messages[r.opening :], "reward": r.reward} for r in group.rollouts],
        }
        for group in groups
        if group.rollouts
    ]
