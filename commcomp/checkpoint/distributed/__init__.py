"""Storage for torch.distributed.checkpoint whose shards are coded against those of the checkpoint before."""
