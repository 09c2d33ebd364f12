"""Turns hidden states into tokens and logprobs."""
