"""Folders that torch.distributed.checkpoint wrote: `.metadata` and `.distcp` files, read without unpickling."""
