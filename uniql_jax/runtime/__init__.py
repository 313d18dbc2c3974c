"""Loading checkpoints and generating text."""
