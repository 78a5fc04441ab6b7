"""The models and preference pairs that are measured: made with fixed seeds, the same files for every toolkit."""

import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ARITHMETIC = Path(__file__).resolve().parents[1] / "data" / "arithmetic" / "pairs" / "train.jsonl"
SEED = 42
SYNTHETIC = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
SYNTHETIC |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}


@dataclass(frozen=True)
class Cell:
    """One comparison. `vocabulary` is of the synthetic model; 0 stands for SmolLM2-135M-Instruct.

    shape: `long prompt` (384 + 64 tokens), `short prompt` (32 + 96), `ragged` (both log-normal), each pair its own
    prompt; for SmolLM2 `few-shot` (worked examples before the question) and `question` (the question alone).
    """

    vocabulary: int
    shape: str
    use_peft: bool
    pairs_per_step: int = 4
    steps: int = 2

    @property
    def name(self) -> str:
        model = f"{self.vocabulary // 1024}k" if self.vocabulary else "SmolLM2"
        return f"{model}, {self.shape}, {'LoRA' if self.use_peft else 'full'}"

    @property
    def learning_rate(self) -> float:
        """Large enough that the loss moves within a few steps: equal losses then say that the updates are equal."""
        return (1e-3 if self.use_peft else 1e-4) * (1.0 if self.vocabulary else 0.1)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def build(cell: Cell, folder: Path) -> None:
    """Write `model/` with its tokenizer, `llmrl.jsonl` (pairs) and `trl.jsonl` (the same in the order of training)."""
    from llmrl.data.order import rows_for_step

    if not (folder / "model").exists():
        synthetic_model(folder / "model", cell.vocabulary) if cell.vocabulary else _smollm2(folder / "model")
    count = cell.pairs_per_step * cell.steps
    rows = _synthetic_pairs(cell, count) if cell.vocabulary else _arithmetic_pairs(cell, count, folder / "model")
    order = [row for step in range(cell.steps) for row in rows_for_step(step, cell.pairs_per_step, count, SEED)]
    _write(folder / "llmrl.jsonl", rows)
    _write(folder / "trl.jsonl", [rows[i] for i in order])


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def synthetic_model(folder: Path, vocabulary: int, chat_template: str | None = None, **shape: Any) -> None:
    """A Llama with tied embeddings, random weights, and a tokenizer of one token a word.

    `shape`: keys of its configuration that differ from `SYNTHETIC`.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(SEED)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=vocabulary, **{**SYNTHETIC, **special, **shape})
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": 0, "<unk>": 1, "<end>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


def _synthetic_pairs(cell: Cell, count: int) -> list[dict[str, str]]:
    draw = random.Random(f"{SEED} {cell.shape}")

    def lengths() -> tuple[int, int, int]:
        if cell.shape == "long prompt":
            return 384, 64, 64
        if cell.shape == "short prompt":
            return 32, 96, 96
        prompt = min(max(round(draw.lognormvariate(4.85, 0.8)), 16), 512)
        answers = [min(max(round(draw.lognormvariate(3.9, 0.7)), 8), 192) for _ in range(2)]
        return prompt, answers[0], answers[1]

    def words(number: int) -> str:
        return " ".join(f"w{draw.randrange(3, cell.vocabulary)}" for _ in range(number))

    rows = []
    for _ in range(count):
        prompt, chosen, rejected = lengths()
        # The tokenised completion ends with the EOS, which both toolkits append.
        rows.append({"prompt": words(prompt), "chosen": " " + words(chosen - 1), "rejected": " " + words(rejected - 1)})
    return rows


def _smollm2(folder: Path) -> None:
    """The model in float32: a CPU user of either toolkit would train it so."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmrl.models.smollm2 import smollm2

    source = smollm2()
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def _arithmetic_pairs(cell: Cell, count: int, model: Path) -> list[dict[str, str]]:
    """The bundled pairs, rendered by the chat template to plain text, which both toolkits tokenise alike."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = [json.loads(line) for line in ARITHMETIC.read_text(encoding="utf-8").splitlines()]
    draw, shots = random.Random(f"{SEED} {cell.shape}"), 6 if cell.shape == "few-shot" else 0
    rows = []
    for _ in range(count):
        *examples, asked = draw.sample(lines, shots + 1)
        messages = [message for line in examples for message in line["prompt"] + line["chosen"]] + asked["prompt"]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        rows.append({"prompt": prompt} | {kind: asked[kind][0]["content"] for kind in ("chosen", "rejected")})
    return rows


def clear(folder: Path) -> None:
    """Remove what a measurement left behind: every folder but the model's."""
    for path in folder.iterdir():
        if path.is_dir() and path.name != "model":
            shutil.rmtree(path)
