"""The commands of `hydratune …`, one file each; torch is imported by those that need a model, once they run."""
