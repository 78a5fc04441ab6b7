"""The keys of `llmrl sample`. Loads without torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llmrl.config.keys import NonNegative, Positive, Text
from llmrl.rewards.keys import RewardFunctionKeys, RewardKeys

Form = Literal["scored", "pairs", "best_and_worst", "best", "segments"]


CORRECT = RewardFunctionKeys(function="correct_number", options={})


class SampleKeys(RewardKeys):
    """What is sampled, and what is written."""

    model: Text | None = None
    """The model that is asked: a folder (of an adapter, too), a hub id, `starter` or `smollm2`."""
    prompts: Text | None = None
    """What it is asked: a hub id, a folder or a file with a column `prompt`, and the columns that the rewards read."""
    split: Text = "train"
    """Split of `prompts` (a single file has only `train`)."""
    max_prompts: Positive | None = None
    """Ask only the first so many; null = all."""
    rewards: Annotated[list[RewardFunctionKeys], Field(min_length=1, default_factory=lambda: [CORRECT])]
    """Reward functions, each a name or a section (function, weight, name, options); their weighted sum counts."""
    samples_per_prompt: Positive = 8
    """Answers to each prompt."""
    max_new_tokens: Positive = 256
    """Longest answer in tokens; a longer one is cut off, and marked so."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; 1 where the log-probabilities are to be the model's own."""
    seed: NonNegative = 0
    """Seed of what is drawn."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the model's weights; auto is float32 on a CPU and bfloat16 on a GPU."""
    from_run: Text | None = None
    """Instead of `model`: the directory of a run that has kept its rollouts, with their rewards."""
    steps: list[Positive] = Field(default_factory=list)
    """Of `from_run`: the steps whose rollouts are taken; empty = all that were kept."""
    from_samples: Text | None = None
    """Instead of `model`: a file of scored samples, to make something else of it."""
    form: Form = "scored"
    """What is written: scored samples; pairs of a right and a wrong answer, or of the best and the worst; the best
    answer, as a supervised row; or scored segments, which also hold rollouts of several turns."""
    pairs_per_prompt: Positive = 2
    """Of form pairs: at most so many of one prompt, each with another wrong answer."""
    right_above: float | None = 0.5
    """Of forms pairs and best: an answer is right if its reward is above this; null: the best need not be right."""
    max_rows: Positive | None = None
    """Stop when so many rows are made; null = when the prompts are through."""
    least_rows: Positive = 1
    """Fewer rows are a failure, and nothing is written."""
    output: Text
    """The file to write, JSON Lines. It must not be there yet."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [name for name in ("model", "from_run", "from_samples") if getattr(self, name) is not None]
        if len(sources) != 1:
            raise ValueError(
                "give one source of answers: model with prompts, from_run, or from_samples; given are "
                f"{', '.join(sources) or 'none of them'}"
            )
        if self.model is not None and self.prompts is None:
            raise ValueError("prompts: name what the model is to be asked")
        for names, source in ((ASKING, "model"), (("steps",), "from_run")):
            unused = [name for name in names if name in self.model_fields_set]
            if unused and source not in sources:
                raise ValueError(f"{unused[0]} is for answers from {source}, and has no meaning with {sources[0]}")
        if self.form == "pairs" and self.right_above is None:
            raise ValueError("right_above null: pairs need to know what is right; use form best_and_worst")
        return self


ASKING = (
    "prompts", "split", "max_prompts", "samples_per_prompt", "max_new_tokens", "temperature", "seed", "dtype",
    *RewardKeys.model_fields,
)  # fmt: skip


def described(keys: SampleKeys) -> dict[str, str | int | float]:
    """What the keys come to, for `--dry-run`."""
    if keys.model is not None:
        most = f"{keys.max_prompts:,}" if keys.max_prompts else "all"
        answers = f"{keys.samples_per_prompt} of {keys.model} to each of {most} prompts in {keys.prompts}"
    elif keys.from_run is not None:
        steps = f"step {', '.join(map(str, keys.steps))}" if keys.steps else "all steps that were kept"
        answers = f"rollouts of {keys.from_run}, {steps}"
    else:
        answers = f"those in {keys.from_samples}"
    rows = f"at least {keys.least_rows:,}" + (f" and at most {keys.max_rows:,}" if keys.max_rows else "")
    return {"answers": answers, "written": f"{keys.output}: {rows} rows of form {keys.form}"}
