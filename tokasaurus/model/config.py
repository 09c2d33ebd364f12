"""The shape of a model, as its architecture reads it from ``config.json``. No torch.

Knows nothing of files, weights or the names of architectures: ``architectures`` fills it in.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokasaurus.model.rope_config import RopeConfig

__all__ = ["ModelConfig"]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer.

    Attributes:
        architecture: its name in the registry.
        max_position_embeddings: tokens, after the RoPE scaling that was asked for.
        tie_word_embeddings: the head shares the embedding's weight.
        qkv_bias: queries, keys and values have biases.
        output_bias: the attention's output has a bias.
        mlp_bias: the MLP's products have biases.
        qk_norm: each head of queries and keys is normalised before the rotation.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeConfig

    @property
    def kv_elements_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Numbers in all weights; those that embedding and head share count once."""
        vocabulary = self.vocab_size * self.hidden_size
        vocabularies = vocabulary if self.tie_word_embeddings else 2 * vocabulary
        return vocabularies + self.num_layers * self._layer_parameters + self.hidden_size

    @property
    def num_product_parameters(self) -> int:
        """Numbers in the weights that quantization makes smaller: those of the layers' products."""
        hidden = self.hidden_size
        # Of a product, either side is the hidden size; the sizes of the other sides add up.
        return (
            self.num_layers
            * hidden
            * (2 * self._query_size + 2 * self._key_size + 3 * self.intermediate_size)
        )

    @property
    def num_product_rows(self) -> int:
        """Rows of these weights."""
        rows = self._query_size + 2 * self._key_size + 2 * self.intermediate_size
        return self.num_layers * (rows + 2 * self.hidden_size)

    @property
    def activation_elements_per_token(self) -> int:
        """Numbers that the layers hold at a time for each token of a batch, at most.

        The residual stream and a layer's update of it are there all the time. Beside them comes
        the larger of:

        - attention: the normed input, queries, keys and values, what the heads mix, its product;
        - the MLP: the normed input, gate and up, their product, and the update.

        An input of a product may be copied in fp32, which counts twice, and the rotation's fp32
        cosines and sines count too.
        """
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self._query_size, self._key_size
        attention = 2 * hidden + 2 * queries + 2 * keys
        mlp = 2 * hidden + 3 * inner
        copied = 2 * max(hidden, queries, inner)
        return 2 * hidden + max(attention, mlp) + copied + 4 * self.head_dim

    @property
    def _query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def _key_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def _layer_parameters(self) -> int:
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self._query_size, self._key_size
        total = 2 * hidden  # norms
        total += (queries + 2 * keys + queries + 3 * inner) * hidden
        if self.qkv_bias:
            total += queries + 2 * keys
        if self.output_bias:
            total += hidden
        if self.mlp_bias:
            total += 2 * inner + hidden
        if self.qk_norm:
            total += 2 * self.head_dim
        return total
