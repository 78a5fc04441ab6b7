"""The keys of methods that sample from the policy while they train: rows and environment, sampling, engine."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmrl.config.keys import Housekeeping, Keys, NonNegative, Positive, Text

Seconds = Annotated[float, Field(gt=0)]


class EngineKeys(Keys):
    """A section: what generates the rollouts."""

    kind: Literal["huggingface", "vllm", "vllm_server"] = "huggingface"
    """huggingface samples from the trained model itself; vllm is an engine in this process with weights of its own;
    vllm_server are servers that are reached over HTTP."""
    max_rows: Annotated[int, Field(ge=1), Housekeeping()] = 64
    """Completions under way at once in the huggingface engine: a knob for memory."""
    max_cache_tokens: Annotated[int, Field(ge=1), Housekeeping()] = 65_536
    """Tokens that the huggingface engine's cache may come to hold."""
    urls: Annotated[list[str], Housekeeping()] = Field(default=["http://127.0.0.1:8000"])
    """The servers of vllm_server."""
    allow_remote: Annotated[bool, Housekeeping()] = False
    """Let `urls` name other machines: their control endpoints are open to whoever reaches them."""
    weights_dir: Annotated[str | None, Housekeeping()] = None
    """Folder through which vllm_server's servers get new weights; they must find it under the same path. It is made
    where it is not there, and holds up to two copies of them. null = `weights` in output_dir, gone at its end."""
    patience_seconds: Annotated[float, Field(gt=0), Housekeeping()] = 300.0
    """How long a server that does not answer is tried again before the run stops with a checkpoint."""
    request_seconds: Annotated[float, Field(gt=0), Housekeeping()] = 600.0
    """The longest that one completion of a vllm_server, or its loading of weights, may take."""
    lora: Literal["auto", "merged", "adapter"] = "auto"
    """How a LoRA adapter reaches a vLLM engine: merged into the weights or on its own; auto: merged on a CPU."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1), Housekeeping()] = 0.4
    """Share of a GPU's memory that the vllm engine in this process takes."""
    sleep: Annotated[bool, Housekeeping()] = False
    """Give the engine's memory to training between a step's rollouts and the next one's: vllm and vllm_server on GPUs
    (weights go to the machine's memory, keys and values away), and huggingface. Not with max_staleness 1."""


class RolloutKeys(Keys):
    """A section: what ends a rollout, and what becomes of those that break."""

    max_turns: Positive = 1
    """Completions in one rollout."""
    cut_turns: Literal["go_on", "end"] = "go_on"
    """A turn that ran into max_completion_length is closed and answered like any other, or ends the rollout."""
    environment_seconds: Annotated[float, Field(gt=0), Housekeeping()] = 60.0
    """A call of the environment, its constructor too, that takes longer breaks its rollout."""
    rollout_seconds: Annotated[float | None, Field(gt=0), Housekeeping()] = None
    """A rollout that takes longer is broken; null = no limit."""
    concurrent: Annotated[int, Field(ge=1), Housekeeping()] = 256
    """Rollouts under way at once."""
    on_error: Literal["fail", "retry", "accept"] = "retry"
    """A broken rollout (an environment that raises or hangs) ends the run, is tried again with a fresh environment, or
    is left out."""
    retries: NonNegative = 2
    """Further tries of a broken rollout with on_error retry."""
    min_per_group: Positive = 2
    """A prompt with fewer rollouts than this (that have a reward) is left out."""
    early_stop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The rest is given up once this share of all rollouts has ended, broken ones among them, and every prompt has
    min_per_group that did not break, or none under way (LOOP: 0.9)."""


class SamplingKeys(Keys):
    """Rollouts: what the policy is asked, how it is sampled, in which units."""

    dataset_name: Text | None = None
    """The prompts: a hub id, a folder, or a JSONL, JSON, Parquet or CSV file; null where the environment makes its own.
    Every column reaches the environment and the reward functions."""
    dataset_config: str | None = None
    """Configuration (subset) of a hub dataset."""
    dataset_train_split: Text = "train"
    """Split to train on."""
    dataset_test_split: Text = "test"
    """Split held out for evaluation; where the data has none, eval_rows of the train split are held out."""
    eval_rows: NonNegative = 64
    """Held-out rows that are answered before, during and after training; 0 = none."""
    eval_temperature: Annotated[float, Field(ge=0), Housekeeping()] = 0.0
    """Temperature of these answers; 0 is greedy."""
    eval_samples: Annotated[int, Field(ge=1), Housekeeping()] = 1
    """Answers to each held-out row, of which the mean counts (avg@k); the interval is over rows."""
    environment: Text = "question_answer"
    """What the policy acts in: a built-in environment, reasoning_gym:TASK, FILE.py:CLASS or PACKAGE.MODULE:CLASS."""
    environment_options: dict[str, Any] = Field(default_factory=dict)
    """The environment's own options."""
    environment_rows: Positive = 1000
    """Rows to train on where the environment makes them."""
    environment_weight: float = 1.0
    """Weight of the environment's own rewards beside the reward functions."""
    samples_per_prompt: Positive = 8
    """Rollouts of each prompt (TRL: num_generations)."""
    max_completion_length: Positive = 256
    """Tokens that may be sampled in one turn."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens of a whole rollout, prompts and answers of the environment included; null = what the model can take."""
    overlong_prompts: Literal["error", "drop"] = "error"
    """What happens to a row whose prompt leaves no room for max_completion_length; dropped rows are counted."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; log-probabilities are those at this temperature."""
    stop_tokens: list[Text] = Field(default_factory=list)
    """Texts that end a turn beside the model's own end tokens; each must be one token, and the very token must be
    sampled. It is an action, and part of the message unless the tokenizer calls it special."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, such as enable_thinking."""
    history: Literal["as_template", "keep"] = "as_template"
    """Where the chat template rewrites earlier turns: obey it and go on in a new piece, or keep what was said."""
    rollout: RolloutKeys = Field(default_factory=RolloutKeys)
    """What ends a rollout, and what becomes of those that break."""
    engine: EngineKeys = Field(default_factory=EngineKeys)
    """What generates the rollouts."""
    reference: Literal["auto", "adapter_off", "frozen"] = "auto"
    """Where the reference's log-probabilities come from, if the method has one: auto is adapter_off with use_peft,
    else a frozen copy."""
    form: Literal["auto", "tree", "padded"] = "auto"
    """Forward pass: prefix trees (a prompt is computed once for all its rollouts) or padded rows."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """1: the rollouts of the next step are sampled while this one trains, from weights one step old. 0: never stale."""
    save_rollouts: Annotated[int | None, Field(ge=0), Housekeeping()] = None
    """Steps whose rollouts/step_N.jsonl is kept, the newest ones; 0 = none is written, null = all are kept."""
    max_empty_steps: Annotated[int, Field(ge=1), Housekeeping()] = 20
    """The run stops after so many steps in a row in which nothing could be learned."""
    most_skipped_updates: Annotated[int, Field(ge=0), Housekeeping()] = 5
    """Updates in a row that may be left out because loss or gradient is not finite; one more ends the run. Under
    DeepSpeed, too. Each is counted in `skipped_updates`; what only float16's loss scale has made so is not."""

    @model_validator(mode="after")
    def _sampling_combinations(self) -> Self:
        if self.max_staleness and self.engine.kind == "huggingface":
            raise ValueError(
                "max_staleness 1 needs an engine with weights of its own: engine.kind huggingface samples from the "
                "very model that is being updated. Use vllm or vllm_server, or max_staleness 0"
            )
        if self.eval_samples > 1 and self.eval_temperature == 0:
            raise ValueError(
                f"eval_samples {self.eval_samples} at eval_temperature 0 gives the same answer every time: raise "
                "eval_temperature, or set eval_samples to 1"
            )
        if self.max_staleness and self.engine.sleep:
            raise ValueError("engine.sleep with max_staleness 1: the engine samples while the policy is trained")
        if self.max_length is not None and self.max_length <= self.max_completion_length:
            raise ValueError(
                f"max_length {self.max_length} leaves no room for a prompt beside max_completion_length "
                f"{self.max_completion_length}"
            )
        return self


class StepKeys(Keys):
    """Rollouts: how many prompts a step of the method has."""

    prompts_per_step: Positive = 16
    """Prompts in one step, over all processes together."""


class PolicyGradientKeys(Keys):
    """Policy gradient: what an update does. `null` is the algorithm's own, published value."""

    beta: Annotated[float, Field(ge=0)] | None = None
    """Weight of the KL divergence from the reference, in the reward or in the loss as the algorithm has it."""
    clip_low: Annotated[float, Field(ge=0, le=1)] | None = None
    """The ratio is clipped to [1 - clip_low, 1 + clip_high] (TRL: epsilon)."""
    clip_high: Annotated[float, Field(ge=0)] | None = None
    """See clip_low (TRL: epsilon_high)."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus."""
    correction: Literal["auto", "none", "truncate", "mask"] = "auto"
    """Importance weights against the difference between the sampler's and the learner's probabilities: cut at
    correction_cap, or masked outside it; auto: truncate with a vLLM engine, none with huggingface."""
    correction_level: Literal["token", "sequence", "geometric"] = "token"
    """What has one such weight."""
    correction_cap: Annotated[float, Field(ge=1)] = 3.0
    """Largest such weight."""
    dynamic_sampling: bool | None = None
    """Replace prompts whose rollouts are all equally good by the next ones, up to ten times a step (dapo_clip does)."""
    overlong_buffer: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of max_completion_length, its end, over which a punishment of length grows to -1 beside the reward; of
    several turns the longest counts; 0 = none (dapo_clip: 0.2)."""
    epochs_per_step: Positive | None = None
    """Passes over a step's rollouts (TRL: num_iterations)."""
    rollouts_per_update: Positive | None = None
    """Rollouts in one optimizer step; null = as many as make the algorithm's number of steps, mostly one."""
    minibatches: Literal["rollouts", "prompts"] = "rollouts"
    """What an update is drawn from: single rollouts, as published, or whole prompts with about rollouts_per_update
    together: a prompt is then computed once an epoch, not once for every update that has a rollout of it.
    rollouts_per_update is then rounded to whole prompts, and LOOP's divisor with it."""
    mask_truncated_completions: bool = False
    """Rollouts that a limit of tokens or turns cut off stay in their group's statistics, but are not trained on and
    count in no denominator of the loss (DAPO's overlong filtering; in TRL sequence means count them still). LOOP
    divides by rollouts_per_update, however many are left: fewer make a smaller step."""
