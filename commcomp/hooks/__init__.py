"""Thin adapters from the places where gradients appear to `GradientSync`."""
