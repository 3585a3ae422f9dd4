"""commcomp inside DeepSpeed: gradients, tokens of a Mixture of Experts, checkpoints."""
