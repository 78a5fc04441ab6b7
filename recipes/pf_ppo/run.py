"""accelerate launch recipes/pf_ppo/run.py --config recipes/pf_ppo/tiny.yaml [--key value ...]"""

from llmrl.runs import main
from llmrl.trainers.pf_ppo import PFPPOConfig, describe, train

if __name__ == "__main__":
    main(PFPPOConfig, describe, train)
