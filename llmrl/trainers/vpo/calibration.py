"""Calibration answers of VPO that are drawn from the reference: once, with the initial weights, and kept as a file.

Invariants
- An attempt that begins at the first step draws; one that goes on from a checkpoint reads what that run has drawn, if
  the file's digest is the one that the checkpoint has, and draws again if not. The file can be read by people: a line
  for each prompt, its answers as texts beside their token ids.
- What is drawn for a prompt follows from the weights, the seed and the list of prompts, not from how many processes
  share the work.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmrl.errors import RefusedError
from llmrl.evaluation.progress import Ticker
from llmrl.files import digest, write_lines
from llmrl.learner.learner import Learner
from llmrl.learner.sequences import Group, completion, restored, stored
from llmrl.learner.sharding import zero_stage
from llmrl.learner.together import from_first, gather
from llmrl.rollout.huggingface import HuggingFaceEngine
from llmrl.rollout.protocol import SamplingParams, row_seed
from llmrl.runs import Run

FILE = Path("rollouts") / "calibration.jsonl"
PROMPTS_AT_ONCE = 32

Answers = dict[int, Group]
"""By a row's number (from 1): the answers to its prompt."""


def drawn_once(
    run: Run, learner: Learner, rows: set[int], draw: Callable[[], Answers], decode: Callable[[list[int]], str]
) -> Answers:
    """The answers to these rows: those of the run that goes on, else what `draw` gives, which is kept in `FILE`. A row
    to which it gives none has an empty group.

    Call it while the learner still has its initial weights; on all ranks.
    """
    found = from_first(learner.accelerator, lambda: _as_drawn(run))
    if not rows <= found.keys():
        if run.checkpoint is not None:
            run.note(
                f"{FILE} is not there, or not as the checkpoint's run had written it: calibration answers are drawn "
                "again, from the initial weights"
            )
        drawn = draw()
        found = {row: drawn.get(row, ()) for row in sorted(rows)}
    if run.is_main:
        write_answers(run.directory / FILE, found, decode)
        run.digests[str(FILE)] = str(digest(run.directory / FILE))
    return found


def _as_drawn(run: Run) -> Answers:
    """Those of the run that goes on; none where its file is not as it was when the checkpoint was written."""
    if run.checkpoint is None:
        return {}
    kept = run.checkpoint.parents[1] / FILE
    return read_answers(kept) if digest(kept) == run.digests.get(str(FILE), "") else {}


def sampled_answers(
    learner: Learner,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[int, list[int]],
    sampling: SamplingParams,
    max_length: int,
    say: Callable[[str], None],
) -> Answers:
    """`sampling.n` answers to each prompt (token ids, by its row's number) with the weights as they are.

    An answer ends where prompt and answer have `max_length` tokens, at the latest, or as many as the model has
    positions. Raises RefusedError where the model cannot generate here.
    """
    accelerator = learner.accelerator
    positions = _positions(learner)
    engine = HuggingFaceEngine(learner.causal_lm, tokenizer)
    numbers = sorted(prompts)
    chunks = [numbers[i : i + PROMPTS_AT_ONCE] for i in range(0, len(numbers), PROMPTS_AT_ONCE)]
    mine: dict[int, Group] = {}
    ticker = Ticker(say, "prompts answered by the reference, for calibration")
    for index in range(accelerator.process_index, len(chunks), accelerator.num_processes):
        asked = [prompts[number] for number in chunks[index]]
        room = min(sampling.max_tokens, positions - max(map(len, asked)))
        own = replace(sampling, max_tokens=max(room, 1), seed=row_seed(sampling.seed, index, 0))
        with accelerator.autocast():  # sampled in the precision that is trained in
            found = engine.generate(asked, own)
        for number, ids, completions in zip(chunks[index], asked, found, strict=True):
            mine[number] = tuple(completion(ids, one.token_ids[: max_length - len(ids)]) for one in completions)
        ticker(len(mine) * accelerator.num_processes, len(numbers))
    return {number: group for share in gather(accelerator, mine) for number, group in share.items()}


def _positions(learner: Learner) -> int:
    """The longest sequence that the model takes; raises RefusedError where it cannot generate here."""
    if zero_stage(learner.accelerator) == 3:
        raise RefusedError(
            "calibration: reference generates with the whole model on each process, which ZeRO-3 does not have; "
            "sample the answers beforehand and name them by calibration: column, or launch with ZeRO-2 or DDP"
        )
    return getattr(learner.causal_lm.config.get_text_config(), "max_position_embeddings", None) or 2**31


def write_answers(file: Path, answers: Answers, decode: Callable[[list[int]], str]) -> None:
    """A line for each row, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_lines(file, (_line(number, answers[number], decode) for number in sorted(answers)), ensure_ascii=False)


def read_answers(file: Path) -> dict[int, Group]:
    """What `write_answers` wrote; nothing where the file is not there or not whole."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        return {line["row"]: tuple(restored(kept) for kept in line["sequences"]) for line in lines}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _line(number: int, group: Group, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    return {
        "row": number,
        "texts": [decode(sequence.token_ids[sequence.scored].tolist()) for sequence in group],
        "sequences": [stored(sequence) for sequence in group],
    }
