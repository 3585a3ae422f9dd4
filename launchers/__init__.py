"""Programs that start training runs; `ShapedCluster` can be used from Python, too."""
