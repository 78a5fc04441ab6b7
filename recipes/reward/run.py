"""accelerate launch recipes/reward/run.py --config recipes/reward/tiny.yaml [--key value ...]"""

from llmrl.runs import main
from llmrl.trainers.reward import RewardConfig, describe, train

if __name__ == "__main__":
    main(RewardConfig, describe, train)
