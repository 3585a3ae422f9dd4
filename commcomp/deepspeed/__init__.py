"""commcomp inside DeepSpeed's engine, by the block "commcomp" of ds_config."""
