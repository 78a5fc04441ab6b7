"""accelerate launch recipes/brain/run.py --config recipes/brain/tiny.yaml [--key value ...]"""

from llmrl.runs import main
from llmrl.trainers.brain.iterated import BRAInConfig, describe, train

if __name__ == "__main__":
    main(BRAInConfig, describe, train)
