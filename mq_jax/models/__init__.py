"""Models in Flax NNX and readers of their checkpoints."""
