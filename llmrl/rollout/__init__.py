"""Text from models: engines that take token ids and give token ids, so that nothing sampled is ever re-tokenised."""
