"""accelerate launch recipes/dpo/run.py --config recipes/dpo/tiny.yaml [--key value ...]"""

from llmrl.runs import main
from llmrl.trainers.dpo import DPOConfig, describe, train

if __name__ == "__main__":
    main(DPOConfig, describe, train)
