"""The mathematics of compression: tensors in, tensors out. Nothing here imports torch.distributed."""
