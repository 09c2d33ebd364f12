"""Qwen's models under their names in older notes on the architecture.

Their modules are Llama's: ``ModelConfig`` says which biases and norms they have.
"""

from tokasaurus.model.architectures.llama_model import LlamaModel

__all__ = ["Qwen2Model", "Qwen3Model"]

Qwen2Model = Qwen3Model = LlamaModel
