"""The command `commcomp ckpt`: checkpoint files and folders, packed and restored."""
