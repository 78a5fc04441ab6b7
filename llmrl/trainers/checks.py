"""What `llmrl check` says of model, memory and disk: arithmetic on configurations, no weights are loaded."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from llmrl import models
from llmrl.config import ModelKeys, TrainingKeys
from llmrl.errors import RefusedError
from llmrl.learner.loading import model_without_storage, precision

GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: all, and those that are trained."""

    parameters: int
    trained: int


def model_sizes(config: ModelKeys) -> Sizes:
    """Counted on a model without storage, the adapter included."""
    model = model_without_storage(models.resolve(config.model_name_or_path), config)
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def fits(config: TrainingKeys, for_servers: str = "nothing") -> list[str]:
    """Lines about memory and disk. Raises RefusedError where the disk cannot hold what the run will write.

    for_servers: what else lies in output_dir, in two copies: nothing, the adapter, or the weights.
    """
    sizes = model_sizes(config)
    dtype, _ = precision(config, config.mixed_precision, lambda text: None)
    width = dtype.itemsize
    trained_width = 4 if config.use_peft else width
    weights = (sizes.parameters - sizes.trained) * width + sizes.trained * trained_width
    optimizer = sizes.trained * (trained_width + 8)  # gradient, two moments in float32
    checkpoint = sizes.trained * (trained_width + 8)
    export = checkpoint // 3 if config.use_peft else sizes.parameters * width
    if config.save_total_limit:
        kept = config.save_total_limit + 1  # a new one is written before an old one goes
    else:
        kept = math.ceil(max(config.max_steps, 1) / config.save_steps) if config.save_steps else 1
    handed_over = {"nothing": 0, "adapter": 2 * export, "weights": 2 * sizes.parameters * width}[for_servers]
    needed = checkpoint * kept + export + handed_over
    free = shutil.disk_usage(_existing(Path(config.output_dir))).free
    servers = f", {handed_over / GIB:.2f} GiB of them for servers," if handed_over else ""
    lines = [
        f"model: {sizes.parameters / 1e6:,.1f} M parameters, {sizes.trained / 1e6:,.1f} M trained",
        f"memory of one process, without sharding: weights {weights / GIB:.2f} GiB, gradients and optimizer "
        f"{optimizer / GIB:.2f} GiB, beside activations of {config.tokens_per_microbatch} tokens",
        f"disk: {needed / GIB:.2f} GiB{servers} for {kept} checkpoints and the trained model; {free / GIB:.1f} GiB are "
        "free",
    ]
    if needed > free:
        raise RefusedError(
            f"output_dir {config.output_dir}: {lines[-1]}. Free some, lower save_total_limit, or choose another "
            "output_dir"
        )
    return lines


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent if path.parent != path else Path("/"))
