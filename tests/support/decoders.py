"""Small random models of several families, for tests of generation."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

VOCABULARY, STOP = 40, 2
PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 30], [5, 6, 7, 8, 9, 11, 12], [5, 6, 7]]


class Tokenizer:
    """Only what the engine asks of a tokenizer."""

    eos_token_id = STOP


def llama(seed: int = 0, kv_heads: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=128, eos_token_id=STOP, bos_token_id=1, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=STOP, bos_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def gemma2() -> Gemma2ForCausalLM:
    """Sliding windows that bind, and soft-capped attention."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, max_position_embeddings=64, eos_token_id=STOP,
        bos_token_id=1, pad_token_id=0, initializer_range=0.1, attn_implementation="eager",
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def mpt() -> MptForCausalLM:
    """Places are counted by the key's index: there are no position ids to correct them with."""
    torch.manual_seed(0)
    config = MptConfig(
        vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, eos_token_id=STOP, bos_token_id=1,
        initializer_range=0.3, expansion_ratio=2,
    )  # fmt: skip
    return MptForCausalLM(config)
