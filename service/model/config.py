"""The sizes and switches of a GPT-2-shaped model. Made by `service.checkpoint`, read by the model and its runner."""

from dataclasses import dataclass

SIZES_345M = (24, 1024, 16, 1024, 50257)  # layers, hidden size, heads, positions, ids


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything the model's forward pass depends on besides its weights.

    `vocab_size` counts real ids, 0 to vocab_size - 1: rows that pad a checkpoint's table are cut off when it is read.
    `activation` is one of gelu_tanh, gelu, relu, silu, tanh. `dtype` is that of the checkpoint's tensors: float16,
    bfloat16 or float32; what a device computes in is decided elsewhere. The checkpoint's own words (n_layer, ...)
    stay in `service.checkpoint`.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    context_length: int  # positions, prompt and output together
    vocab_size: int
    layer_norm_epsilon: float
    activation: str
    scale_attention: bool  # scores divided by sqrt(head_size)
    scale_attention_by_layer: bool  # scores divided by layer index + 1 as well
    upcast_attention: bool  # scores and softmax in float32 whatever the dtype
    tie_word_embeddings: bool  # the head is the token embedding; otherwise the state has `head.weight`
    end_of_text_id: int
    dtype: str

    @property
    def head_size(self) -> int:
        """Width of one attention head; hidden_size is a whole multiple of num_heads."""
        return self.hidden_size // self.num_heads

    @property
    def is_345m(self) -> bool:
        """Whether the sizes are those of NVIDIA's MegatronGPT2 345M, which is the paper's."""
        sizes = (self.num_layers, self.hidden_size, self.num_heads, self.context_length, self.vocab_size)
        return sizes == SIZES_345M
