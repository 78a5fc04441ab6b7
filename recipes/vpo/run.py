"""accelerate launch recipes/vpo/run.py --config recipes/vpo/tiny.yaml [--key value ...]"""

from llmrl.runs import main
from llmrl.trainers.vpo.offline import VPOConfig, describe, train

if __name__ == "__main__":
    main(VPOConfig, describe, train)
