"""accelerate launch recipes/sft/run.py --config recipes/sft/tiny.yaml [--key value ...]"""

from llmrl.runs import main
from llmrl.trainers.sft import SFTConfig, describe, train

if __name__ == "__main__":
    main(SFTConfig, describe, train)
