"""accelerate launch recipes/direct_advantage/run.py --config recipes/direct_advantage/tiny.yaml [--key value ...]"""

from llmrl.runs import main
from llmrl.trainers.direct_advantage.method import DirectAdvantageConfig, describe, train

if __name__ == "__main__":
    main(DirectAdvantageConfig, describe, train)
