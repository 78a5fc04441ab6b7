"""The `llmrl` command: one function a subcommand, found in one dictionary. Only what works is in it.

Invariants: nothing heavy is imported before a subcommand needs it; a refusal is one message on standard error, exit 2.
"""

import importlib
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from llmrl import __version__
from llmrl.config.keys import RunKeys
from llmrl.config.nearest import nearest
from llmrl.config.parse import parse
from llmrl.config.source import read_yaml
from llmrl.errors import LlmrlError, RefusedError
from llmrl.runs import trackers
from llmrl.runs.claims import claimable
from llmrl.runs.console import Console, complain
from llmrl.runs.launch import dry_run_text

RECIPE_PRESETS = ("tiny.yaml", "laptop.yaml")


def check(words: Sequence[str]) -> None:
    """llmrl check RECIPE_OR_CONFIG [--key value ...]

    Finds every mistake that can be found without training: configuration, data, model and tokenizer, batch arithmetic,
    memory, disk, missing packages. RECIPE is a name such as dpo, or the folder of a recipe (its tiny.yaml is checked);
    CONFIG is a YAML file. Exit code 0 when the run could start, 2 otherwise: also where only its output_dir is taken.
    """
    if not words or words[0].startswith("-"):
        raise RefusedError("name a recipe or a YAML file: llmrl check recipes/dpo/tiny.yaml [--key value ...]")
    config_file = _config_file(words[0])
    method = _method_of(config_file)
    module = _trainer(method)
    config = parse(module.Config, ["--config", str(config_file), *words[1:]]).config
    mistakes, told = _mistakes(config, module)
    console = Console()
    for line in told:
        console.say(line)
    if mistakes:
        raise RefusedError(mistakes[0] if len(mistakes) == 1 else "\n- ".join(["several mistakes:", *mistakes]))
    console.say(f"{config_file}: no mistake found; the run can start")


def report(words: Sequence[str]) -> None:
    """llmrl report RUN_DIR

    Writes RUN_DIR/report.html, a self-contained page of the run, and prints its path. Works while a run is going on and
    for interrupted and failed runs.
    """
    if len(words) != 1 or words[0].startswith("-"):
        raise RefusedError("name one run directory: llmrl report RUN_DIR")
    from llmrl.runs.report import write_report

    try:
        page = write_report(Path(words[0]))
    except OSError as error:
        raise RefusedError(f"the report cannot be written into {words[0]}: {error.strerror or error}") from None
    Console().say(str(page))


def model(words: Sequence[str]) -> None:
    """llmrl model NAME

    Prints the folder of a model that can be had without a hub, fetching or training it first where it is not there yet:
    `smollm2` (SmolLM2-135M-Instruct) or `starter` (a tiny model, trained here in about two minutes).
    """
    if len(words) != 1 or words[0].startswith("-"):
        raise RefusedError("name one model: llmrl model smollm2, or llmrl model starter")
    from llmrl.models import BUNDLED

    if words[0] not in BUNDLED:
        raise RefusedError(
            f"`{words[0]}` is not one of {', '.join(BUNDLED)}; other models are named by hub id or folder"
        )
    Console().say(str(BUNDLED[words[0]](complain)))  # only the folder on standard output, so that a script can use it


def credit(words: Sequence[str]) -> None:
    """llmrl credit --model FOLDER [--reference FOLDER] --data PAIRS [--rows 1,2,3] [--output PAGE.html]

    Shows what a model trained by preferences says of single tokens: beta (log pi - log pi_ref) of each, their sums over
    the steps of an answer, and a pair's two answers above each other; in the terminal, or as a self-contained page.

    --model      the policy; where it is a LoRA adapter, its reference is the same model with the adapter off
    --reference  what the policy was trained from; `starter` and `smollm2` are known by name
    --data       preference pairs, in any format that llmrl trains on (docs/data.md)
    --rows       rows of the data, from 1 (default: 1,2,3)
    --output     the page to write, such as map.html (default: the map is shown in the terminal)
    --beta       the beta of the training (default: 0.1)
    --step_delimiter  a regular expression that ends a step (default: a newline, so that steps are lines)
    --step_function   FILE.py:FUNCTION instead, from an answer's text to the list of its steps
    --tokens_per_microbatch  tokens in one forward pass (default: 4096)
    """
    from llmrl.evaluation.credit.command import CreditKeys
    from llmrl.evaluation.credit.command import run as show

    show(parse(CreditKeys, words).config, Console().say)


def sample(words: Sequence[str]) -> None:
    """llmrl sample --model MODEL --prompts DATA --output FILE.jsonl [--form FORM] [--key value ...]

    Has a model answer prompts, scores its answers, and writes them as data to train on (docs/data.md); or writes those
    that a run has kept (--from_run), or that are in a file already (--from_samples).

    --model         the model that is asked: a folder, a hub id, `starter` or `smollm2`
    --prompts       what it is asked: data with a column `prompt`, and the columns that the rewards read
    --split         split of the prompts (default: train); --max_prompts: the first so many only
    --rewards       reward functions or a reward model (default: correct_number); further keys: docs/rewards.md
    --samples_per_prompt  answers to each prompt (default: 8), of at most --max_new_tokens (default: 256) tokens
    --temperature   of sampling (default: 1), with --seed (default: 0)
    --dtype         of the model's weights (default: float32 on a CPU, bfloat16 on a GPU)
    --from_run      instead of a model: the directory of a run that has kept its rollouts; --steps 1,2: these alone
    --from_samples  instead of a model: a file of scored samples
    --form          scored (default), pairs (a right and a wrong answer), best_and_worst (pairs as well), best
                    (supervised rows) or segments (the only form of rollouts of several turns)
    --pairs_per_prompt  of form pairs: at most so many of a prompt (default: 2)
    --right_above   of forms pairs and best: an answer with a reward above it is right (default: 0.5)
    --max_rows      stop when so many rows are made; fewer than --least_rows (default: 1) are a failure
    --output        the file to write, which must not be there yet
    --dry-run       print the resolved keys and what they come to; load and write nothing
    """
    from llmrl.evaluation.sampling.keys import SampleKeys, described

    command = parse(SampleKeys, words)
    if command.dry_run:
        Console().say(dry_run_text(command.config, described(command.config)))
        return
    from llmrl.evaluation.sampling.making import make

    make(command.config, Console().say)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "check": check,
    "report": report,
    "model": model,
    "credit": credit,
    "sample": sample,
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The console script: runs a subcommand and exits with the code of the contract."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a command that has nothing to save, without a traceback
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """As `main`, but returns the exit code."""
    words = list(argv)
    name = words[0] if words else "--help"
    try:
        if name in ("-h", "--help", "help"):
            Console().say(usage())
        elif name == "--version":
            Console().say(f"llmrl {__version__}")
        elif name not in COMMANDS:
            raise RefusedError(f"unknown command `{name}`; did you mean `{nearest(name, COMMANDS)}`? See llmrl --help")
        elif {"-h", "--help"} & set(words[1:]) and (name != "check" or words[1].startswith("-")):
            Console().say(_text(COMMANDS[name]))
        else:
            COMMANDS[name](words[1:])
    except LlmrlError as error:
        complain(f"{'refused' if isinstance(error, RefusedError) else 'failed'}: {error}")
        return error.exit_code
    return 0


def usage() -> str:
    """The commands, each with the first sentence of its text."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {_purpose(command)}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["Usage: llmrl COMMAND ...", "", *lines, "", "llmrl COMMAND --help says more.", "",
         "Training: accelerate launch --config_file launch/accelerate/cpu.yaml recipes/METHOD/run.py \\",
         "            --config recipes/METHOD/PRESET.yaml [--key value ...]"]
    )  # fmt: skip


def _text(command: Callable[[Sequence[str]], None]) -> str:
    lines = [line.removeprefix("    ") for line in (command.__doc__ or "").strip().splitlines()]
    return "\n".join(lines).rstrip()


def _purpose(command: Callable[[Sequence[str]], None]) -> str:
    """The first clause of what a command's text says it does."""
    return re.split(r"[.:,] ", " ".join(_text(command).splitlines()[2:]), maxsplit=1)[0]


def _config_file(word: str) -> Path:
    """The YAML file that a recipe's name, a recipe's folder, or a file's name stands for."""
    path = Path(word)
    if path.suffix in (".yaml", ".yml"):
        return path
    for folder in (path, Path("recipes") / word):
        for preset in RECIPE_PRESETS if folder.is_dir() else ():
            if (folder / preset).is_file():
                return folder / preset
    known = sorted(p.parent.name for preset in RECIPE_PRESETS for p in Path("recipes").glob(f"*/{preset}"))
    has = f"; recipes here: {', '.join(dict.fromkeys(known))}" if known else " (there is no folder recipes/ here)"
    raise RefusedError(f"`{word}` is neither a YAML file nor a recipe with a preset{has}")


def _method_of(config_file: Path) -> str:
    """The `method:` key of the file, else the name of the recipe's folder that holds it."""
    tree, _ = read_yaml(config_file)
    return str(tree.get("method") or config_file.absolute().parent.name)


def _mistakes(config: RunKeys, module: ModuleType) -> tuple[list[str], list[str]]:
    """What would keep the run from starting, and what is to be told of the rest: a directory that is taken, or a
    tracker that is missing, says nothing of data and model, which are looked at all the same."""
    mistakes: list[str] = []
    told: list[str] = []

    def look(at: Callable[[], object]) -> None:
        try:
            at()
        except RefusedError as error:
            mistakes.append(str(error))

    look(lambda: claimable(config))
    look(lambda: trackers.available(config.trackers))
    look(lambda: told.extend(module.check(config)))
    if told and mistakes:
        told.append("data, model, memory and disk: no mistake found")
    return mistakes, told


def _trainer(method: str) -> ModuleType:
    from llmrl.trainers import METHODS

    if method not in METHODS:
        raise RefusedError(
            f"there is no method `{method}`; did you mean `{nearest(method, METHODS)}`? Known are {', '.join(METHODS)}"
        )
    return importlib.import_module(METHODS[method])


if __name__ == "__main__":
    main()
