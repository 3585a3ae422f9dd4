"""Seeing what compression does: TensorBoard scalars, GPU power and use, and reports over finished runs.

Nothing here is needed to compress; the modules import their libraries (tensorboard, nvidia-ml-py, matplotlib)
only when they are used.
"""
