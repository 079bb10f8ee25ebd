"""Hydra's face of `hydratune.sweep`: `hydra/sweeper=hydratune`."""
