"""What goes wrong in an online run ends it in words or is counted, and leaves what a person can go on from."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.online_run import METHODS, REWARD, write_online_config
from support.recipe_run import metrics, run_method

import llmrl.trainers.setup
from llmrl.errors import RefusedError
from llmrl.learner.sharding import PlainBackend
from llmrl.runs import checkpoints
from llmrl.trainers import checks, loop
from llmrl.trainers.loop import LOOPConfig
from llmrl.trainers.online.engines import left_for_servers

Said = pytest.CaptureFixture[str]


def ended(capsys: Said, config: Path, *arguments: str, code: int, method: str = "loop") -> str:
    """What a run that ends with this code says."""
    capsys.readouterr()
    assert run_method(method, config, *arguments) == code
    captured = capsys.readouterr()
    assert "Traceback (most" not in captured.err.partition("raised:")[0]
    return captured.err if code else captured.out


def failed_after(capsys: Said, config: Path, steps: int) -> str:
    """What a run says that fails after so many steps, of which a checkpoint must be left that can be resumed."""
    said = ended(capsys, config, code=1)
    run = config.parent / "run"
    newest = run / "checkpoints" / f"step_{steps}"
    assert checkpoints.latest(run) == (newest if steps else None)
    assert f"{newest} is whole" in said or not steps
    assert len(metrics(run) if (run / "metrics.jsonl").exists() else []) == steps
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("failed", steps)
    return said


# -- rewards -----------------------------------------------------------------------------------------------------------

FAULTY = (
    REWARD
    + '''
import asyncio
import time
calls = 0

def from_call_9(what):
    """Sound for two steps of four prompts."""
    def faulty(completions, **columns):
        global calls
        calls += 1
        return what(completions) if calls > 8 else paid(completions)
    return faulty

def boom(completions):
    raise ValueError("no words for this")

raises = from_call_9(boom)
hangs = from_call_9(lambda completions: time.sleep(60))
gives_nan = from_call_9(lambda completions: [float("nan")] * len(completions))
gives_too_few = from_call_9(lambda completions: paid(completions)[1:])
gives_no_list = from_call_9(lambda completions: 0.5)
gives_none = from_call_9(lambda completions: None)

async def raises_later(completions, **columns):
    await asyncio.sleep(0.001)
    return from_call_9(boom)(completions)

async def never_ends(completions, **columns):
    scores = from_call_9(lambda completions: None)(completions)
    while scores is None:
        await asyncio.sleep(60)
    return scores

def none_at_all(completions, **columns):
    return [None] * len(completions)

def some_nan(completions, **columns):
    return [float("nan"), None, *paid(completions)[2:]]

def equal(completions, **columns):
    return [0.25] * len(completions)
'''
)


def rewarded(tmp_path: Path, function: str, **settings: Any) -> Path:
    (tmp_path / "reward.py").write_text(FAULTY)
    given = {"rewards": [f"{tmp_path / 'reward.py'}:{function}"], "eval_rows": 0, **settings}
    return write_online_config(tmp_path, **given)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", ["reward function raises failed 2 times in a row", "no words for this", "reward.py"]),
        ("hangs", ["reward function hangs failed 2 times in a row", "gave no answer within 0.2 s"]),
        ("gives_nan", ["reward function gives_nan failed 2 times in a row", "nan (float)", "no finite number"]),
        ("gives_too_few", ["reward function gives_too_few returned 3 values; expected a list of 4 numbers"]),
        ("gives_no_list", ["reward function gives_no_list returned 0.5 (float); expected a list of 4 numbers"]),
        ("gives_none", ["reward function gives_none returned None (NoneType); expected a list of 4 numbers"]),
        ("raises_later", ["reward function raises_later failed 2 times in a row", "no words for this", "reward.py"]),
        ("never_ends", ["reward function never_ends failed 2 times in a row", "gave no answer within 0.2 s"]),
    ],
)
def test_a_reward_function_that_breaks_ends_the_run_with_its_name_and_the_steps_before(
    tmp_path: Path, capsys: Said, function: str, words: list[str]
) -> None:
    config = rewarded(tmp_path, function, reward_timeout_seconds=0.2, reward_max_failures=2)
    said = failed_after(capsys, config, steps=2)
    assert all(word in said for word in words), said


def test_completions_without_a_score_are_left_out_and_counted(tmp_path: Path) -> None:
    assert run_method("loop", rewarded(tmp_path, "some_nan", max_steps=2)) == 0
    for line in metrics(tmp_path / "run"):
        assert (line["rollouts"], line["rollout/left_out"]) == (8, 8)
        assert line["updates"] >= 1


@pytest.mark.parametrize("method", ["loop", "ppo", "rlsp", "pf_ppo"])
def test_where_no_completion_has_a_score_the_run_ends_with_the_reason(
    tmp_path: Path, capsys: Said, method: str
) -> None:
    config = rewarded(tmp_path, "none_at_all", max_empty_steps=2, max_steps=9)
    said = ended(capsys, config, code=1, method=method)
    assert "nothing could be learned in 2 steps in a row: no rollout has a reward" in said
    assert checkpoints.latest(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step_2"


def test_equal_rewards_are_said_after_three_steps_and_end_the_run_with_a_checkpoint(
    tmp_path: Path, capsys: Said
) -> None:
    said = failed_after(capsys, rewarded(tmp_path, "equal", max_empty_steps=5, max_steps=20), steps=5)
    assert "nothing could be learned in 5 steps in a row: all rollouts are equally good (mean 0.25)" in said
    assert "Choose easier or harder prompts" in said
    notes = (tmp_path / "run" / "notes.log").read_text()
    assert "nothing could be learned in 3 steps in a row" in notes
    lines = metrics(tmp_path / "run")
    assert {(line["frac_reward_zero_std"], line["updates"], line["num_trained_tokens"]) for line in lines} == {
        (1, 0, 0)
    }


DISK_MEGABYTES = 8


def rows_of(file: Path) -> list[int]:
    return [json.loads(line)["row"] for line in file.read_text().splitlines()]


def test_a_disk_too_full_for_the_rollouts_ends_the_run_with_a_checkpoint(
    small_disk: Path, tmp_path: Path, capsys: Said
) -> None:
    """A function logs more of the third step than the disk can hold; what was written of it makes room again."""
    (tmp_path / "reward.py").write_text(
        FAULTY
        + """
def verbose(completions, log_extra, **columns):
    global calls
    calls += 1
    log_extra("thoughts", ["x" * (3_000_000 if calls > 8 and not MENDED.exists() else 3) for _ in completions])
    return paid(completions)
"""
        + f"from pathlib import Path\nMENDED = Path({str(tmp_path / 'mended')!r})\n"
    )
    run = small_disk / "run"
    config = write_online_config(
        tmp_path, output_dir=str(run), rewards=[f"{tmp_path / 'reward.py'}:verbose"], eval_rows=0
    )
    said = ended(capsys, config, code=1)
    assert f"{run}/rollouts/step_3.jsonl could not be written: No space left on device" in said
    assert "save_rollouts" in said
    assert f"{run}/checkpoints/step_2 is whole" in said
    assert checkpoints.latest(run) == run / "checkpoints" / "step_2"
    assert sorted(file.name for file in (run / "rollouts").iterdir()) == ["step_1.jsonl", "step_2.jsonl"]
    (tmp_path / "mended").touch()
    assert run_method("loop", config, "--resume_from_checkpoint", "latest") == 0
    whole = tmp_path / "whole"
    assert run_method("loop", config, "--output_dir", str(whole)) == 0
    assert rows_of(run / "rollouts" / "step_3.jsonl") == rows_of(whole / "rollouts" / "step_3.jsonl")


# -- environments ------------------------------------------------------------------------------------------------------

ENVIRONMENT = """
import time
calls = 0

class Guess:
    def __init__(self, row, seed, fault):
        global calls
        calls += 1
        self.row, self.fault = row, fault
        self.is_faulty = {"each": True, "once": calls == 20, "late": calls > 40}[WHEN]
        if self.is_faulty and self.fault == "constructor":
            time.sleep(60)

    @staticmethod
    def rows(split, count, seed):
        return [{"word": i % 7} for i in range(count)]

    def init(self):
        if self.is_faulty and self.fault == "init":
            raise KeyError("the board")
        if self.is_faulty and self.fault == "no messages":
            return 7
        return [{"role": "user", "content": "red blue"}]

    def step(self, message):
        if self.is_faulty and self.fault == "raises":
            raise ValueError("the dice are gone")
        if self.is_faulty and self.fault == "hangs":
            time.sleep(60)
        if self.is_faulty and self.fault == "endless":
            return [{"role": "user", "content": "once more"}], False
        if self.is_faulty and self.fault == "no result":
            return "well done"
        if self.is_faulty and self.fault == "nan":
            return [], True, {"length": float("nan")}
        return [], True, {"length": float(len(message["content"].split()))}

    def close(self):
        if self.is_faulty and self.fault == "close":
            raise OSError("the lid is stuck")
"""


def acting(tmp_path: Path, fault: str, when: str, **settings: Any) -> Path:
    (tmp_path / "env.py").write_text(ENVIRONMENT.replace("WHEN", repr(when)))
    given = {
        "dataset_name": None, "rewards": [], "environment": f"{tmp_path / 'env.py'}:Guess", "environment_rows": 24,
        "environment_options": {"fault": fault}, "eval_rows": 0, "max_steps": 4, **settings,
    }  # fmt: skip
    return write_online_config(tmp_path, **given)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raises", ["the environment broke (error-abort): step() raised ValueError: the dice are gone", "env.py"]),
        ("hangs", ["the environment broke (error-timeout): step() took longer than 0.2 s"]),
        ("init", ["the environment broke (error-abort): init() raised KeyError: 'the board'"]),
        ("constructor", ["the environment broke (error-timeout): __init__() took longer than 0.2 s"]),
    ],
)
def test_an_environment_that_breaks_ends_the_run_where_that_was_asked_for(
    tmp_path: Path, capsys: Said, fault: str, words: list[str]
) -> None:
    """The 16 first rows are looked at before; 16 rollouts a step."""
    config = acting(tmp_path, fault, "late", rollout={"on_error": "fail", "environment_seconds": 0.2})
    said = failed_after(capsys, config, steps=1)
    assert all(word in said for word in [*words, "row ", "sample ", "on_error: accept"]), said


def test_an_environment_that_breaks_once_is_tried_again(tmp_path: Path) -> None:
    assert run_method("loop", acting(tmp_path, "raises", "once", rollout={"on_error": "retry"})) == 0
    lines = metrics(tmp_path / "run")
    assert [line.get("rollout/retried", 0) for line in lines] == [1, 0, 0, 0]
    assert {line["rollouts"] for line in lines} == {16}


def test_an_environment_that_goes_on_breaking_ends_the_run_after_its_retries(tmp_path: Path, capsys: Said) -> None:
    config = acting(tmp_path, "raises", "each", rollout={"on_error": "retry", "retries": 1})
    assert "the environment broke, 2 times in a row, (error-abort)" in failed_after(capsys, config, steps=0)


def test_broken_rollouts_are_left_out_and_counted_where_that_was_asked_for(tmp_path: Path) -> None:
    assert run_method("loop", acting(tmp_path, "raises", "once", rollout={"on_error": "accept"})) == 0
    first, *others = metrics(tmp_path / "run")
    assert (first["rollouts"], first["rollout/left_out"], first["rollout/error-abort"]) == (15, 1, 1)
    assert {line["rollouts"] for line in others} == {16}


def test_an_environment_that_never_ends_is_ended_by_max_turns(tmp_path: Path, capsys: Said) -> None:
    config = acting(tmp_path, "endless", "each", rollout={"max_turns": 3}, max_empty_steps=2, max_length=200)
    ended(capsys, config, code=1)
    for line in metrics(tmp_path / "run"):
        assert line["rollout/truncated-turns"] + line.get("rollout/truncated-length", 0) == 16
        assert 1 <= line["rollout/turns"] <= 3


def test_an_environment_that_cannot_be_closed_is_counted(tmp_path: Path) -> None:
    assert run_method("loop", acting(tmp_path, "close", "each", max_steps=1)) == 0
    assert metrics(tmp_path / "run")[0]["rollout/close_failed"] == 16


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no result", "step() returned 'well done' (str); expected (messages, done, rewards by name)"),
        ("nan", "step() gave the reward length nan (float), which is no finite number"),
    ],
)
def test_what_an_environment_may_not_return_breaks_it(tmp_path: Path, capsys: Said, fault: str, words: str) -> None:
    config = acting(tmp_path, fault, "late", rollout={"on_error": "fail"})
    assert words in failed_after(capsys, config, steps=1)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("init", "KeyError: 'the board'"),
        ("no messages", "init() returned 7 (int); expected a list"),
        ("constructor", "__init__() took longer than 0.2 s"),
    ],
)
def test_an_environment_that_does_not_begin_is_refused(tmp_path: Path, capsys: Said, fault: str, words: str) -> None:
    said = ended(capsys, acting(tmp_path, fault, "each", rollout={"environment_seconds": 0.2}), code=2)
    assert "env.py:Guess does not begin: " in said
    assert words in said
    assert not (tmp_path / "run").exists()


# -- gradients ---------------------------------------------------------------------------------------------------------


def with_infinite_gradients(patch: pytest.MonkeyPatch, updates: range) -> None:
    """An inf in one parameter's gradient in these updates (from 1)."""
    apply, calls = PlainBackend.apply, 0

    def broken(self: PlainBackend) -> float:
        nonlocal calls
        calls += 1
        if calls in updates:
            next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
        return apply(self)

    patch.setattr(PlainBackend, "apply", broken)


def test_updates_that_are_not_finite_are_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_infinite_gradients(monkeypatch, range(3, 5))
    config = write_online_config(tmp_path, most_skipped_updates=3)
    assert run_method("loop", config) == 0
    lines = metrics(tmp_path / "run")
    assert [line["skipped_updates"] for line in lines] == [0, 2, 0, 0]
    assert [line["updates"] for line in lines] == [2, 2, 2, 2]
    assert lines[1]["grad_norm"] is None  # NaN, which JSON has not
    weights = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    assert weights != (tmp_path / "model" / "model.safetensors").read_bytes()


def test_too_many_of_them_in_a_row_end_the_run(tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    with_infinite_gradients(monkeypatch, range(5, 100))
    said = failed_after(
        capsys, write_online_config(tmp_path, most_skipped_updates=2, save_steps=1, max_steps=9), steps=3
    )
    assert "gradient norm inf: not finite, 3 updates in a row" in said
    assert "Lower learning_rate" in said


# -- engines -----------------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_named_at_once(tmp_path: Path, capsys: Said) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    config = write_online_config(tmp_path, engine={"kind": "vllm_server", "urls": [url], "patience_seconds": 0.3})
    said = failed_after(capsys, config, steps=0)
    assert url in said
    assert "ConnectError" in said


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    write_online_config(tmp_path)
    return tmp_path / "prompts.jsonl"


def refused(capsys: Said, folder: Path, *words: str, method: str = "loop", **settings: Any) -> None:
    said = ended(capsys, write_online_config(folder, **settings), code=2, method=method)
    assert said.startswith("refused: ")
    assert said.count("refused") == 1
    assert all(word in said for word in words), said
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"environment": "number_gessing", "dataset_name": None, "rewards": []},
         ["unknown environment `number_gessing`; did you mean `number_guessing`?"]),
        ({"environment": "number_guessing", "dataset_name": None, "rewards": [], "environment_options": {"nmbers": 5}},
         ["nmbers", "numbers"]),
        ({"environment_options": {"promt_column": "prompt"}}, ["promt_column", "prompt_column"]),
        ({"rewards": ["acuracy"]}, ["there is no reward function `acuracy`; did you mean `accuracy`?"]),
        ({"rewards": [{"function": "exact_match", "options": {"colum": "answer"}}]}, ["colum", "exact_match"]),
        ({"rewards": ["nowhere.py:paid"]}, ["nowhere.py", "no such file"]),
        ({"rewards": []}, ["question_answer has no rewards of its own", "`rewards`"]),
        ({"samples_per_prompt": 1}, ["samples_per_prompt 1", "at least 2"]),
        ({"max_staleness": 1}, ["max_staleness 1", "huggingface", "vllm"]),
        ({"dataset_name": None}, ["question_answer makes no rows of its own", "dataset_name"]),
        ({"max_completion_length": 256}, ["max_completion_length 256", "lower it"]),
        ({"max_length": 500}, ["max_length 500 exceeds the model's 256 positions"]),
        ({"max_length": 8}, ["max_length 8", "max_completion_length 8"]),
        ({"engine": {"kind": "vlm"}}, ["engine", "vlm"]),
        ({"algorithm": "grop"}, ["algorithm", "grop"]),
        ({"environment_options": {"prompt_column": "question"}}, ["question", "prompts.jsonl"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_configuration_is_refused_and_nothing_is_left(
    tmp_path: Path, capsys: Said, settings: dict[str, Any], words: list[str]
) -> None:
    refused(capsys, tmp_path, *words, **settings)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('raise ValueError("no words")', ["reward function own, tried with one short answer, raised", "no words"]),
        ("return [1.0] * 3", ["tried with one short answer", "reward function own returned 3 values"]),
        ("time.sleep(60)", ["reward function own, tried with one short answer, gave no answer within 0.2 s"]),
    ],
)
def test_check_tries_each_of_the_users_reward_functions_once(tmp_path: Path, body: str, words: list[str]) -> None:
    own = "import time\n\ndef {name}(completions, answer, log_metric, trainer_state, **columns):\n    {body}\n"
    sound = "log_metric('called', 1); return [float(text is not None) for text in completions]"
    (tmp_path / "own.py").write_text(own.format(name="own", body=body) + own.format(name="sound", body=sound))
    settings = {"reward_timeout_seconds": 0.2, "rewards": [f"{tmp_path / 'own.py'}:sound"]}
    check = METHODS["loop"].check
    check(LOOPConfig(**yaml.safe_load(write_online_config(tmp_path, **settings).read_text())))
    settings["rewards"] = [*settings["rewards"], f"{tmp_path / 'own.py'}:own"]
    with pytest.raises(RefusedError) as refusal:
        check(LOOPConfig(**yaml.safe_load(write_online_config(tmp_path, **settings).read_text())))
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "engine.kind huggingface samples with the whole model"),
        ({"engine": {"kind": "vllm_server"}, "task_evaluation": {"dataset_name": "x"}}, "task_evaluation generates"),
        ({"engine": {"kind": "vllm_server"}, "algorithm": "grpo"}, "reference: frozen keeps a whole copy"),
    ],
)
def test_what_zero3_cannot_have_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], words: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setattr(llmrl.trainers.setup, "load_model", None)
    refused(capsys, tmp_path, words, **settings)


def test_a_missing_answer_column_is_refused(tmp_path: Path, capsys: Said, prompts: Path) -> None:
    prompts.write_text('{"prompt": "red blue"}\n' * 20)
    words = ["prompts.jsonl", "correct_number needs the column", "`answer`", "prompt"]
    refused(capsys, tmp_path, *words, rewards=["correct_number"])


def test_a_prompt_that_is_too_long_is_refused_with_its_row_or_dropped_and_counted(
    tmp_path: Path, capsys: Said, prompts: Path
) -> None:
    rows = prompts.read_text().splitlines()
    rows[6] = json.dumps({"prompt": "red " * 300, "answer": "1"})
    prompts.write_text("\n".join(rows) + "\n")
    refused(capsys, tmp_path, "prompts.jsonl", "row 7", "305 tokens", "overlong_prompts to drop", eval_rows=0)
    said = ended(capsys, write_online_config(tmp_path, overlong_prompts="drop", max_steps=1, eval_rows=0), code=0)
    assert "1 of 64 rows dropped" in said


def test_a_row_that_is_no_prompt_is_refused_with_its_number(tmp_path: Path, capsys: Said, prompts: Path) -> None:
    rows = [json.loads(row) for row in prompts.read_text().splitlines()]
    rows[4]["prompt"] = None
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(capsys, tmp_path, "prompts.jsonl", "row 5", "prompt", eval_rows=0)


# -- disk --------------------------------------------------------------------------------------------------------------


def test_the_disk_is_asked_to_hold_the_weights_that_servers_are_given(tmp_path: Path) -> None:
    """Two copies, in output_dir unless another folder is named; a merged adapter makes whole weights."""
    servers = {"kind": "vllm_server", "lora": "merged"}

    def left(**settings: Any) -> str:
        return left_for_servers(
            loop.LOOPConfig(**yaml.safe_load(write_online_config(tmp_path, **settings).read_text()))
        )

    assert left() == "nothing"
    assert left(engine={**servers, "weights_dir": str(tmp_path)}) == "nothing"
    assert left(engine=servers) == left(engine=servers, use_peft=True) == "weights"
    assert left(engine={**servers, "lora": "adapter"}, use_peft=True) == "adapter"
    config = loop.LOOPConfig(**yaml.safe_load(write_online_config(tmp_path, save_steps=1).read_text()))
    said = [checks.fits(config, what)[-1] for what in ("nothing", "weights")]
    assert "for servers" not in said[0]
    assert "GiB of them for servers" in said[1]


def test_what_a_killed_run_has_left_for_servers_goes_when_it_is_resumed(tmp_path: Path, capsys: Said) -> None:
    leftover = tmp_path / "run" / "weights" / "llmrl-weights-x" / "model.safetensors"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    engine = {"kind": "vllm_server", "urls": [url], "patience_seconds": 0.1}
    ended(capsys, write_online_config(tmp_path, engine=engine), code=1)
    assert not (tmp_path / "run" / "weights").exists()
