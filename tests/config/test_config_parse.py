"""The command line and the YAML file: what is taken, what is refused, and in which words."""

import contextlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from llmrl.config import (
    DataKeys,
    Keys,
    ModelKeys,
    OptimizationKeys,
    RunKeys,
    TaskEvaluationKeys,
    parse,
    parse_file,
    to_yaml,
)
from llmrl.config.nearest import SAMPLING
from llmrl.config.schema import all_paths
from llmrl.errors import RefusedError
from llmrl.trainers.loop import LOOPConfig
from llmrl.trainers.ppo import PPOConfig


class Toy(ModelKeys, DataKeys, OptimizationKeys, RunKeys):
    """Toy: keys of the method itself."""

    method: Literal["toy"] = "toy"
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Pull towards the reference."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    task_evaluation: TaskEvaluationKeys | None = None
    """Accuracy on problems."""
    extra: dict[str, Any] = {}  # noqa: RUF012 (pydantic copies it)


NEEDED = ["--model_name_or_path", "starter", "--dataset_name", "pairs.jsonl", "--output_dir", "out"]


def config_of(*words: str) -> Toy:
    return parse(Toy, [*NEEDED, *words]).config


def refusal(*words: str) -> str:
    with pytest.raises(RefusedError) as caught:
        parse(Toy, [*NEEDED, *words])
    return str(caught.value)


def yaml_file(folder: Path, text: str, name: str = "toy.yaml") -> str:
    file = folder / name
    file.write_text(textwrap.dedent(text), encoding="utf-8")
    return str(file)


# ---- arguments


def test_values_take_the_type_of_the_schema():
    config = config_of(
        "--learning_rate", "1e-4", "--max_steps=20", "--max_grad_norm", "0", "--use_peft", "--run_name", "007",
        "--gradient_checkpointing", "no", "--dataset_config", "1e3",
    )  # fmt: skip
    assert config.learning_rate == 1e-4
    assert config.max_steps == 20
    assert config.max_grad_norm == 0.0
    assert config.use_peft is True
    assert config.gradient_checkpointing is False
    assert config.run_name == "007"
    assert config.dataset_config == "1e3"


def test_a_negative_number_is_a_value_and_not_a_key():
    assert config_of("--max_steps", "-1").max_steps == -1


def test_a_value_may_begin_with_dashes_after_an_equals_sign():
    assert config_of("--run_name=--odd=name").run_name == "--odd=name"


def test_dashes_in_a_key_are_taken_as_underscores():
    assert config_of("--learning-rate", "0.5").learning_rate == 0.5


def test_later_beats_earlier():
    assert config_of("--seed", "1", "--seed", "2").seed == 2


@pytest.mark.parametrize(
    "words", [["q_proj,v_proj"], ["[q_proj, v_proj]"], ["q_proj", "v_proj"], ["q_proj, v_proj"]], ids=str
)
def test_a_list_may_be_written_in_each_usual_way(words: list[str]):
    assert config_of("--lora_target_modules", *words).lora_target_modules == ["q_proj", "v_proj"]


def test_one_word_stays_text_where_text_or_a_list_is_wanted():
    assert config_of("--lora_target_modules", "all-linear").lora_target_modules == "all-linear"


def test_null_means_nothing():
    assert config_of("--save_total_limit", "null").save_total_limit is None


def test_sections_by_dotted_keys_whole_and_removed(tmp_path: Path):
    file = yaml_file(tmp_path, "task_evaluation: {dataset_name: a.jsonl, limit: 5}")
    assert config_of("--config", file, "--task_evaluation.limit", "7").task_evaluation == TaskEvaluationKeys(
        dataset_name="a.jsonl", limit=7
    )
    assert config_of("--task_evaluation.dataset_name", "b.jsonl").task_evaluation is not None
    assert config_of("--task_evaluation", "{dataset_name: c.jsonl}").task_evaluation is not None
    assert config_of("--config", file, "--task_evaluation", "null").task_evaluation is None


def test_free_form_values_are_typed_as_yaml_reads_them():
    config = config_of("--extra.rate", "1e-4", "--extra.on", "true", "--extra.word", "no", "--extra.deep", "{n: 3}")
    assert config.extra == {"rate": 1e-4, "on": True, "word": "no", "deep": {"n": 3}}


def test_dry_run_is_said_apart_from_the_configuration():
    assert parse(Toy, [*NEEDED, "--dry-run"]).dry_run
    assert parse(Toy, ["--dry_run", *NEEDED]).dry_run
    assert not parse(Toy, NEEDED).dry_run


# ---- refusals


def test_an_unknown_key_names_itself_and_the_nearest():
    message = refusal("--learning_rte", "1e-4")
    assert "`learning_rte`" in message
    assert "--learning_rte" in message
    assert "did you mean `learning_rate`" in message


def test_an_unknown_key_in_a_section_names_the_section():
    message = refusal("--task_evaluation.dataset_name", "x", "--task_evaluation.limt", "3")
    assert "did you mean `task_evaluation.limit`" in message


def test_the_right_key_in_the_wrong_place_is_found():
    assert "did you mean `task_evaluation.max_new_tokens`" in refusal("--max_new_tokens", "3")


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("env", "shell"),
        ("per_device_train_batch_size", "tokens_per_microbatch"),
        ("bf16", "mixed_precision"),
        ("use_lora", "use_peft"),
    ],
)
def test_names_from_elsewhere_get_their_replacement(word: str, remedy: str):
    message = refusal(f"--{word}", "8")
    assert word in message
    assert remedy in message


def test_trls_names_lead_to_the_keys_of_methods_that_sample():
    for name, (key, _) in SAMPLING.items():
        known = [c for c in (LOOPConfig, PPOConfig) if tuple(key.split(".")) in all_paths(c)]
        assert known, f"{name} leads to {key}, which no method has"
        with pytest.raises(RefusedError, match=rf"`{name}` \(argument --{name}\): use {re.escape(key)}\b"):
            parse(known[0], ["--model_name_or_path", "x", "--output_dir", "out", f"--{name}", "4"])


def test_the_page_for_trls_users_has_all_of_these_names_and_no_other_key_for_them():
    page = (Path(__file__).resolve().parents[2] / "docs" / "coming_from_trl.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    told = {name: right for left, right in rows for name in re.findall(r"`(\w+)`", left)}
    assert told.keys() == SAMPLING.keys() | {"gradient_accumulation_steps"}
    assert [name for name, (key, _) in SAMPLING.items() if f"`{key}`" not in told[name]] == []


@pytest.mark.parametrize("name", ["num_generations", "use_vllm"])
def test_a_method_that_does_not_sample_is_not_told_of_keys_that_it_lacks(name: str):
    assert SAMPLING[name][0] not in refusal(f"--{name}", "4")


def test_env_in_the_file_is_explained(tmp_path: Path):
    message = refusal("--config", yaml_file(tmp_path, "seed: 1\nenv:\n  WANDB_MODE: offline\n"))
    assert "`env`" in message
    assert "toy.yaml, line 2" in message
    assert "shell" in message


@pytest.mark.parametrize(
    ("words", "expected", "got"),
    [
        (["--learning_rate", "fast"], "a number greater than 0", "`fast`"),
        (["--learning_rate", "0"], "a number greater than 0", "`0`"),
        (["--learning_rate", "nan"], "a number greater than 0", "`nan`"),
        (["--learning_rate", "inf"], "a number", "`inf`"),
        (["--max_steps", "4.5"], "a whole number", "`4.5`"),
        (["--max_steps", "true"], "a whole number", "`true`"),
        (["--learning_rate", "true"], "a number", "`true`"),
        (["--use_peft", "maybe"], "true or false", "`maybe`"),
        (["--dtype", "float64"], "one of auto, float32", "`float64`"),
        (["--seed", "null"], "a whole number", "null"),
        (["--dataset_name", ""], "text, not empty", "``"),
        (["--save_total_limit", "0"], "at least 1", "`0`"),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_expected(words: list[str], expected: str, got: str):
    message = refusal(*words)
    assert f"`{words[0][2:]}`" in message
    assert expected in message
    assert got in message
    assert f"argument {words[0]}" in message


def test_a_key_without_its_value():
    assert "--seed has no value; expected a whole number" in refusal("--seed", "--use_peft")


def test_two_values_for_a_key_that_takes_one():
    assert "--run_name takes one value" in refusal("--run_name", "my", "run")


def test_a_stray_word_is_refused_and_a_file_gets_a_hint():
    with pytest.raises(RefusedError, match=r"did you mean `--config tiny\.yaml`"):
        parse(Toy, ["tiny.yaml"])
    with pytest.raises(RefusedError, match="unexpected argument `train`"):
        parse(Toy, ["train"])


def test_missing_keys_are_named_with_the_way_to_give_them():
    with pytest.raises(RefusedError) as caught:
        parse(Toy, ["--dataset_name", "x", "--output_dir", "y"])
    assert "`model_name_or_path` is missing" in str(caught.value)
    assert "--model_name_or_path VALUE" in str(caught.value)


def test_a_missing_key_of_a_section():
    assert "`task_evaluation.dataset_name` is missing" in refusal("--task_evaluation.limit", "3")


def test_every_mistake_is_named_at_once():
    message = refusal("--learning_rte", "1", "--seed", "x", "--max_stepz", "3")
    assert "3 mistakes" in message
    assert all(word in message for word in ("learning_rte", "`seed`", "max_stepz"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max_steps", "0"], "nothing would be trained"),
        (["--lr_scheduler_type", "constant", "--warmup_ratio", "0.1"], "constant_with_warmup"),
        (["--dtype", "float16"], "float16"),
        (["--report_to", "wandbb"], "did you mean `wandb`"),
        (["--lora_target_modules", "[]"], "lora_target_modules is empty"),
    ],
)
def test_impossible_combinations(words: list[str], says: str):
    assert says in refusal(*words)


def test_float16_is_possible_under_an_adapter():
    assert config_of("--dtype", "float16", "--use_peft").dtype == "float16"


# ---- the file


def test_the_file_and_arguments_over_it(tmp_path: Path):
    file = yaml_file(
        tmp_path,
        """\
        model_name_or_path: starter
        dataset_name: a.jsonl
        output_dir: out
        learning_rate: 5e-5        # YAML 1.1 reads this as text
        mixed_precision: no        # and this as false
        run_name: 2024-01-01       # and this as a date
        dataset_config: 010        # and this as eight
        use_peft: yes
        hub_model_id: null
        lora_target_modules: [q_proj, v_proj]
        task_evaluation:
          dataset_name: p.jsonl
          limit: 12
        """,
    )
    config = parse(Toy, ["--config", file, "--seed", "5"]).config
    assert config.learning_rate == 5e-5
    assert config.mixed_precision == "no"
    assert config.run_name == "2024-01-01"
    assert config.dataset_config == "010"
    assert config.use_peft is True
    assert config.hub_model_id is None
    assert config.lora_target_modules == ["q_proj", "v_proj"]
    assert config.task_evaluation is not None
    assert config.task_evaluation.limit == 12
    assert config.seed == 5


def test_quoted_null_is_text(tmp_path: Path):
    assert config_of("--config", yaml_file(tmp_path, "run_name: 'null'")).run_name == "null"


def test_anchors_and_merge_keys(tmp_path: Path):
    file = yaml_file(
        tmp_path, "task_evaluation:\n  <<: &base {dataset_name: p.jsonl, limit: 3}\n  limit: 4\nextra: {copy: *base}\n"
    )
    config = config_of("--config", file)
    assert config.task_evaluation == TaskEvaluationKeys(dataset_name="p.jsonl", limit=4)
    assert config.extra == {"copy": {"dataset_name": "p.jsonl", "limit": 3}}


def test_an_unknown_key_in_the_file_names_file_and_line(tmp_path: Path):
    message = refusal("--config", yaml_file(tmp_path, "seed: 3\n\nmax_stepz: 3\n"))
    assert "`max_stepz`" in message
    assert "toy.yaml, line 3" in message
    assert "did you mean `max_steps`" in message


def test_an_unknown_key_in_a_section_of_the_file(tmp_path: Path):
    message = refusal("--config", yaml_file(tmp_path, "task_evaluation:\n  dataset_name: x\n  batchsize: 3\n"))
    assert "`task_evaluation.batchsize` (" in message
    assert "line 3" in message
    assert "`task_evaluation.batch_size`" in message


def test_a_wrong_type_in_the_file_names_file_and_line(tmp_path: Path):
    message = refusal("--config", yaml_file(tmp_path, "seed: 3\nlearning_rate: [1, 2]\n"))
    assert "`learning_rate`: expected a number" in message
    assert "line 2" in message


def test_an_argument_that_overrides_the_file_is_the_one_that_is_blamed(tmp_path: Path):
    message = refusal("--config", yaml_file(tmp_path, "seed: 3\n"), "--seed", "x")
    assert "argument --seed" in message
    assert "line 1" not in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 3\nlearning_rate: [1, 2\nbeta: 1\n", "line 3"),
        ("seed: 3\n\tbeta: 1\n", "spaces"),
        ("seed: 3\nseed: 4\n", "line 2: `seed` is given twice (first on line 1)"),
        ("- seed\n- beta\n", "got a list"),
        ("just words\n", "got `just words`"),
        ("beta: !!python/object:os.system x\n", "tag"),
        ("beta: !mine 3\n", "tag !mine"),
        ("? [a, b]\n: 3\n", "a key must be a plain word"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("extra: &x {self: *x}\n", "alias refers to itself"),
        ("extra: '{a: &x [*x]}'\n", "expected keys and values"),
    ],
)
def test_a_broken_file_names_itself_and_the_place(tmp_path: Path, text: str, says: str):
    message = refusal("--config", yaml_file(tmp_path, text))
    assert "toy.yaml" in message
    assert says in message


def test_an_empty_file_is_no_keys(tmp_path: Path):
    assert config_of("--config", yaml_file(tmp_path, "# nothing\n")) == config_of()


def test_a_missing_file_is_named_with_its_neighbours(tmp_path: Path):
    yaml_file(tmp_path, "", "tiny.yaml")
    message = refusal("--config", str(tmp_path / "tinny.yaml"))
    assert "tinny.yaml does not exist" in message
    assert "tiny.yaml" in message


def test_a_directory_and_a_binary_file_are_refused(tmp_path: Path):
    assert "is a directory" in refusal("--config", str(tmp_path))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00seed")
    assert "cannot be read as UTF-8" in refusal("--config", str(tmp_path / "b.yaml"))


def test_an_argument_that_refers_to_itself():
    assert "alias refers to itself" in refusal("--extra", "{a: &x [*x]}")


def test_two_files_or_none_after_config():
    assert "given twice" in refusal("--config", "a.yaml", "--config", "b.yaml")
    assert "takes the name of one YAML file" in refusal("--config")


def test_parse_file_takes_overrides(tmp_path: Path):
    file = yaml_file(tmp_path, "model_name_or_path: m\ndataset_name: d\noutput_dir: o\n")
    assert parse_file(Toy, file, seed="9", learning_rate="2e-5").learning_rate == 2e-5


# ---- from Python


def test_the_types_hold_from_python_too():
    good = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
    assert Toy(**good, beta=0.2).beta == 0.2
    with pytest.raises(ValidationError):
        Toy(**good, betta=0.2)
    with pytest.raises(ValidationError):
        Toy(**good).seed = 3  # type: ignore[misc]


def test_trackers_are_a_list_however_they_are_given():
    assert config_of().trackers == []
    assert config_of("--report_to", "wandb").trackers == ["wandb"]
    assert config_of("--report_to", "tensorboard,trackio,tensorboard").trackers == ["tensorboard", "trackio"]
    assert config_of("--report_to", "none").trackers == []


# ---- properties

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(text=WORDS, rate=st.floats(1e-12, 1e3), seed=st.integers(0, 2**32 - 1), modules=st.lists(WORDS, max_size=3))
def test_the_resolved_file_gives_back_the_same_configuration(
    tmp_path_factory: pytest.TempPathFactory, text: str, rate: float, seed: int, modules: list[str]
):
    config = Toy(
        model_name_or_path=text, dataset_name="d", output_dir=text, run_name=text, learning_rate=rate, seed=seed,
        lora_target_modules=modules or "all-linear", extra={"words": modules, "word": text, "rate": rate},
    )  # fmt: skip
    file = tmp_path_factory.mktemp("resolved") / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert parse_file(Toy, file) == config


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(
        st.one_of(WORDS, st.sampled_from(["--seed", "--extra.a", "--task_evaluation", "--dry-run", "{", "--"]))
    )
)
def test_whatever_is_typed_ends_in_a_configuration_or_a_refusal(words: list[str]):
    with contextlib.suppress(RefusedError):  # any other exception fails the test
        assert parse(Toy, [*NEEDED, *(word for word in words if word != "-h")]).config.method == "toy"


# ---- help


def test_help_lists_every_key_with_type_default_and_text(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        parse(Toy, ["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for key in Toy.model_fields:
        assert f"--{key}  " in text
    assert "--beta  a number greater than 0 (default 0.1)\n      Pull towards the reference." in text
    assert "--output_dir  text (required)" in text
    assert "--task_evaluation.limit  " in text


def test_help_groups_keys_and_keeps_texts_where_only_a_default_changed(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(Toy, ["-h"])
    text = capsys.readouterr().out
    order = [text.index(title) for title in ("Toy:", "Model:", "Data:", "Optimization:", "Run:")]
    assert order == sorted(order)
    assert "--learning_rate  a number greater than 0 (default 1e-06)\n      Peak learning rate" in text


def test_every_shared_key_has_a_text():
    for group in (ModelKeys, DataKeys, OptimizationKeys, RunKeys, TaskEvaluationKeys):
        assert issubclass(group, Keys)
        assert [key for key, field in group.model_fields.items() if not field.description] == []


def test_configuration_and_runs_import_without_torch():
    code = (
        "import sys, llmrl.cli, llmrl.config, llmrl.runs; print({'torch', 'transformers'} & set(sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
