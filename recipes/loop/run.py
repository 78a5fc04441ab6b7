"""accelerate launch recipes/loop/run.py --config recipes/loop/tiny.yaml [--key value ...]"""

from llmrl.runs import main
from llmrl.trainers.loop import LOOPConfig, describe, train

if __name__ == "__main__":
    main(LOOPConfig, describe, train)
