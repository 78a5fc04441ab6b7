"""accelerate launch recipes/ppo/run.py --config recipes/ppo/tiny.yaml [--key value ...]"""

from llmrl.runs import main
from llmrl.trainers.ppo import PPOConfig, describe, train

if __name__ == "__main__":
    main(PPOConfig, describe, train)
