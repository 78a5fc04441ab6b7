"""accelerate launch recipes/rlsp/run.py --config recipes/rlsp/tiny.yaml [--key value ...]"""

from llmrl.runs import main
from llmrl.trainers.rlsp import RLSPConfig, describe, train

if __name__ == "__main__":
    main(RLSPConfig, describe, train)
