"""Reference models in Flax NNX and readers of Hugging Face checkpoints."""
