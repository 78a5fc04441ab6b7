"""llmrl: post-training of Hugging Face language models with feedback."""

__version__ = "0.1.0"
