"""What a model is worth: perplexity, and what an encoding of its table costs."""
