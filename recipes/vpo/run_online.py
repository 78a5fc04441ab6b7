"""accelerate launch recipes/vpo/run_online.py --config recipes/vpo/online.yaml [--key value ...]"""

from llmrl.runs import main
from llmrl.trainers.vpo.online import VPOOnlineConfig, describe, train

if __name__ == "__main__":
    main(VPOOnlineConfig, describe, train)
