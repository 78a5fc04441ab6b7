"""What methods that sample from their policy are made of.

config        keys; command: what --dry-run and `llmrl check` say of them; both load without torch
run           SampledRun: rows, learner, rollouts, evaluation and their records
task          what is asked of the policy and how it is judged; metrics: what is logged of rollouts
sampler       where a step's rollouts come from; ahead, collected: parts of it; engines: what generates them
experience    rollouts as the learner takes them, and the optimizer steps made of them

policy_gradient_config, _command and _run add what PPO, LOOP, RLSP and PF-PPO have in common.
"""
