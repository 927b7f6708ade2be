"""The laws on any causal LM: ours, or transformers' as its users call it."""
