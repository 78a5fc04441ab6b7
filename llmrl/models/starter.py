"""The starter: a Llama of 0.4 million parameters that can do some arithmetic, trained from scratch on first use.

It exists so that every recipe can be tried offline in minutes. Its schooling was of mixed quality, as the web's text
is: in most of the solutions with a carry the carry is forgotten. So it knows the right way and prefers the wrong one,
which is what feedback can mend: a model that lacks the knowledge cannot be taught it by preferences between its own
answers (tried: DPO then lowers its accuracy). Two kinds of problem that it half knows, and one that it never saw, leave
room beyond that. Training is the sft recipe's own (the
same code, in a process of its own, so that neither a launcher's environment nor random states mix); the result is
cached under a fingerprint of the data and the settings.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import llmrl
from llmrl.errors import RefusedError, RunFailedError
from llmrl.models.cache import cache_root, make_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Say = Callable[[str], None]

VERSION = 3  # raised whenever this code comes to make another model of the same data and settings
DATA = Path("data") / "arithmetic"
TEXT = Path("mixed") / "train.jsonl"
PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2
VOCABULARY = 320
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MODEL: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the narrowest that vLLM computes on a CPU
    "max_position_embeddings": 1024,
    "initializer_range": 0.07,
    "tie_word_embeddings": True,
}
TRAINING: dict[str, Any] = {
    "learning_rate": 4e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "max_steps": 2200,
    "sequences_per_step": 12,
    "max_length": 128,
    "tokens_per_microbatch": 3072,
    "logging_steps": 100,
    "seed": 0,
}
PROBLEMS = {"dataset_test_split": "validation", "limit": 200, "max_new_tokens": 64, "batch_size": 200}
RECIPE = (
    "from llmrl.runs import main; from llmrl.trainers.sft import SFTConfig, describe, train; "
    "main(SFTConfig, describe, train)"
)
# A launcher's variables: the process that trains the starter is alone, whatever this one belongs to.
LAUNCHER = (
    "ACCELERATE_",
    "DEEPSPEED_",
    "FSDP_",
    "GROUP_",
    "LOCAL_",
    "MASTER_",
    "RANK",
    "ROLE_",
    "TORCHELASTIC_",
    "WORLD_",
)


def starter(say: Say = print) -> Path:
    """The folder of the starter model, trained if it is not in the cache (two minutes of one free core).

    Raises `RefusedError` if the project's data is not there, `RunFailedError` if the training fails.
    """
    data = _data_folder()
    folder = cache_root() / "models" / f"starter-{_fingerprint(data)}"
    return make_once(folder, lambda unfinished: _train(unfinished, data, say), say)


def _data_folder() -> Path:
    """`data/arithmetic` of the project that this package is installed from (editable), or of the working directory."""
    places = [Path(llmrl.__file__).resolve().parents[1] / DATA, Path.cwd() / DATA]
    for place in places:
        if (place / TEXT).exists():
            return place
    raise RefusedError(
        f"the starter model is trained on the project's own data, which is neither at {places[0]} nor at {places[1]}. "
        "Remedy: give the command in a checkout of the project, or name another model."
    )


def _fingerprint(data: Path) -> str:
    """Of what decides the weights: the training data, the settings, and `VERSION`."""
    settings = json.dumps([VERSION, PAD, BOS, EOS, VOCABULARY, CHAT_TEMPLATE, MODEL, TRAINING], sort_keys=True)
    return hashlib.sha256((data / TEXT).read_bytes() + settings.encode()).hexdigest()[:12]


def _train(folder: Path, data: Path, say: Say) -> dict[str, Any]:
    """Fill `folder` with the trained model."""
    say(
        "training the starter model from scratch, once (two minutes of one free core); it will be kept in "
        f"{cache_root() / 'models'}"
    )
    with TemporaryDirectory(prefix="llmrl_starter_") as name:
        scratch = Path(name)
        _write_untrained(scratch / "untrained", data)
        _run_recipe(scratch, data, say)
        for item in (scratch / "run" / "final").iterdir():
            (folder / item.name).write_bytes(item.read_bytes())
        summary = json.loads((scratch / "run" / "summary.json").read_text(encoding="utf-8"))
    task = summary["eval_after"]["task"]
    say(
        f"starter model: {task['accuracy']:.0%} of {task['n']:.0f} held-out problems right ({summary['seconds']:.0f} s)"
    )
    return {
        "source": "trained from scratch by llmrl on data/arithmetic/mixed",
        "licence": "Apache-2.0",
        "accuracy": task["accuracy"],
        "steps": summary["steps"],
        "seconds": summary["seconds"],
    }


def _write_untrained(folder: Path, data: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer(data / TEXT)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **MODEL, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TRAINING["seed"])
        model = LlamaForCausalLM(config)
    model.generation_config.update(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tokenizer(file: Path) -> "PreTrainedTokenizerFast":
    """A byte-level BPE of `VOCABULARY` tokens, learned from a JSONL file with `prompt` and `completion` messages.

    Each digit is a token of its own; what lies between digits may become one token, whole words and blanks included,
    which halves the length of the sequences. Any other text is spelled in bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_turns(file), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MODEL["max_position_embeddings"],
    )


def _turns(file: Path) -> Iterator[str]:
    """The text between the special tokens of each rendered dialogue."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            for message in (*row["prompt"], *row["completion"]):
                yield f"{message['role']}\n{message['content']}"


def _run_recipe(scratch: Path, data: Path, say: Say) -> None:
    """The sft recipe in a process of its own, on the CPU; its progress is passed on."""
    keys: dict[str, Any] = {
        "model_name_or_path": scratch / "untrained",
        "dataset_name": data / TEXT,
        "eval_rows": 0,
        "output_dir": scratch / "run",
        **TRAINING,
        "task_evaluation.dataset_name": data / "problems",
        **{f"task_evaluation.{key}": value for key, value in PROBLEMS.items()},
    }
    command = [sys.executable, "-c", RECIPE, *(f"--{key}={value}" for key, value in keys.items())]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
    # One thread: a second one hardly helps at this size, costs a factor of ten where other processes run too, and would
    # make another model of the same seed.
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with (scratch / "errors").open("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            for line in process.stdout or ():
                if line.startswith("step "):
                    say(f"starter model: {line.strip()}")
            code = process.wait()
        finally:
            process.kill()
        if code != 0:
            errors.seek(0)
            raise RunFailedError(
                f"the starter model could not be trained (exit code {code}): {errors.read()[-2000:].strip()}"
            )
