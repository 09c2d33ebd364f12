"""From hidden states to tokens and logprobs."""
