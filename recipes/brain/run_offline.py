"""accelerate launch recipes/brain/run_offline.py --config recipes/brain/offline.yaml [--key value ...]"""

from llmrl.runs import main
from llmrl.trainers.brain.offline import BRAInOfflineConfig, describe, train

if __name__ == "__main__":
    main(BRAInOfflineConfig, describe, train)
