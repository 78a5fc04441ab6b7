"""One file per method: its configuration and its loop. `METHODS` names the module of each.

A method's module offers `Config`, `describe(config, world_size)`, `check(config)` and `train(config, run)`, and imports
torch only inside functions, so that a command line can be checked at once.
"""

METHODS: dict[str, str] = {
    "dpo": "llmrl.trainers.dpo",
    "sft": "llmrl.trainers.sft",
    "reward": "llmrl.trainers.reward",
}
