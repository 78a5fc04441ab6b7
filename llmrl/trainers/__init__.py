"""One module per method (`METHODS` names them): its configuration and its loop. Beside them stands what methods share.

`setup` builds learners and evaluators, `session` is what surrounds the steps, `checks` is what `llmrl check` says of
memory and disk; `offline` is what methods on a fixed set of groups share, `online` what methods share that sample from
their policy, `with_trl` what those share that TRL trains. A method that needs several files has a folder of its own.

A method's module offers `Config`, `describe(config, world_size)`, `check(config)` and `train(config, run)`, and imports
torch only inside functions, so that a command line can be checked at once.
"""

METHODS: dict[str, str] = {
    "dpo": "llmrl.trainers.dpo",
    "vpo": "llmrl.trainers.vpo.offline",
    "vpo_online": "llmrl.trainers.vpo.online",
    "cpl": "llmrl.trainers.cpl",
    "brain": "llmrl.trainers.brain.iterated",
    "brain_offline": "llmrl.trainers.brain.offline",
    "loop": "llmrl.trainers.loop",
    "ppo": "llmrl.trainers.ppo",
    "rlsp": "llmrl.trainers.rlsp",
    "pf_ppo": "llmrl.trainers.pf_ppo",
    "direct_advantage": "llmrl.trainers.direct_advantage.method",
    "sft": "llmrl.trainers.sft",
    "reward": "llmrl.trainers.reward",
}
