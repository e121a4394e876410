"""Training-free scores: one file for each."""
