"""Loads DeepSpeed, if it is there, in the fork server: each rank would take five seconds for it."""

import os
from importlib.util import find_spec

if find_spec("deepspeed") is not None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops
    import deepspeed.runtime.zero.stage3

    # It would be compiled for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
