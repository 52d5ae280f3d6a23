"""What several test files share: a model small enough to be exact about."""
import signal

import pytest
import torch

from model import ModelConfig, Transformer

# A runner that was started in the background ignores Ctrl-C, and the programs that the tests start
# and interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def tiny():
    """tiny(dtype, **config fields) -> a two-layer model whose weights leave no term negligible."""
    def make(dtype: torch.dtype = torch.float64, **changes) -> Transformer:
        config = ModelConfig(**{
            "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
            "bos_token_id": None, "eos_token_id": None} | changes)
        model, generator = Transformer(config).double(), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                mean = 1.0 if name.endswith("norm.weight") else 0.0
                parameter.normal_(mean, 0.3, generator=generator)
        return model.to(dtype)
    return make
