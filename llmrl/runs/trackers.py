"""Trackers (tensorboard, trackio, wandb ...) through accelerate's public classes.

Invariants: a missing package is refused before anything expensive; trackers start when training does or the first value
comes, as the trainer has set accelerate up by then; a tracker that fails later is dropped with a word and never stops
the training.
"""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmrl.config.keys import RunKeys
from llmrl.errors import RefusedError

# name in report_to: (class in accelerate.tracking, module that it needs, what to install)
CLASSES = {
    "aim": ("AimTracker", "aim", "aim"),
    "clearml": ("ClearMLTracker", "clearml", "clearml"),
    "comet_ml": ("CometMLTracker", "comet_ml", "comet-ml"),
    "dvclive": ("DVCLiveTracker", "dvclive", "dvclive"),
    "mlflow": ("MLflowTracker", "mlflow", "mlflow"),
    "swanlab": ("SwanLabTracker", "swanlab", "swanlab"),
    "tensorboard": ("TensorBoardTracker", "tensorboard", "tensorboard"),
    "trackio": ("TrackioTracker", "trackio", "trackio"),
    "wandb": ("WandBTracker", "wandb", "wandb"),
}
PROJECT = "llmrl"


def available(names: list[str]) -> list[str]:
    """The trackers to use; `all` becomes those installed. Raises RefusedError naming a package that is missing."""
    if "all" in names:
        return [name for name, (_, module, _) in CLASSES.items() if _installed(module)]
    for name in names:
        _, module, package = CLASSES[name]
        if not _installed(module):
            raise RefusedError(
                f"report_to names {name}, but the package {package} is not installed: "
                f"`pip install {package}`, or take {name} out of report_to"
            )
    return names


class Trackers:
    """The trackers of one run, started at the first value."""

    def __init__(self, names: list[str], config: RunKeys, directory: Path, say: Callable[[str], None]) -> None:
        self._names = names
        self._config = config
        self._directory = directory
        self._say = say
        self._started: dict[str, Any] | None = None

    def log(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Passes finite values on. Raises RefusedError when a tracker cannot be started."""
        if not self._names:
            return
        known = {key: value for key, value in values.items() if value is not None}
        for name, tracker in list(self.start().items()):
            try:
                tracker.log(known, step=step)
            except Exception as error:  # whatever a service answers, the training is worth more
                self._drop(name, error)

    def finish(self) -> None:
        """Closes what was started."""
        for name, tracker in list((self._started or {}).items()):
            try:
                tracker.finish()
            except Exception as error:
                self._drop(name, error)
        self._started, self._names = None, []

    def start(self) -> dict[str, Any]:
        """Those that run, started if they are not yet. Raises RefusedError when one cannot be started."""
        if self._started is None:
            self._started = {}
            for name in self._names:
                self._started[name] = self._make(name)
        return self._started

    def _make(self, name: str) -> Any:
        import accelerate
        import accelerate.tracking

        accelerate.PartialState()  # the trainer's, where it has made one; trackers need it to exist
        run_name = self._config.run_name or self._directory.resolve().name
        project, options = _arguments(name, run_name, self._directory)
        try:
            tracker = getattr(accelerate.tracking, CLASSES[name][0])(project, **options)
            tracker.start()
            tracker.store_init_configuration(_flat(self._config.model_dump(mode="json")))
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise RefusedError(
                f"the tracker {name} could not be started: {why}. Mend that, or take it out of report_to"
            ) from error
        return tracker

    def _drop(self, name: str, error: Exception) -> None:
        if self._started is not None:
            self._started.pop(name, None)
        self._say(f"the tracker {name} failed and is left out from here on: {' '.join(str(error).split())[:300]}")


def _arguments(name: str, run_name: str, directory: Path) -> tuple[str, dict[str, Any]]:
    """The project (or, for trackers that only have one name, the run) and further options of a tracker class."""
    match name:
        case "tensorboard" | "aim":
            return run_name, {"logging_dir": str(directory / name)}
        case "wandb":
            return PROJECT, {"name": run_name, "dir": str(directory)}
        case "trackio":
            return PROJECT, {"name": run_name, "resume": "allow"}
        case "mlflow":
            return PROJECT, {"run_name": run_name}
        case "swanlab":
            return PROJECT, {"experiment_name": run_name}
        case _:
            return run_name, {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections as dotted keys, lists and nothing as text: what every tracker can store."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
