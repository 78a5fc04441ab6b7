"""accelerate launch recipes/cpl/run.py --config recipes/cpl/tiny.yaml [--key value ...]"""

from llmrl.runs import main
from llmrl.trainers.cpl import CPLConfig, describe, train

if __name__ == "__main__":
    main(CPLConfig, describe, train)
