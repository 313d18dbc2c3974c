"""The blocks of a model, as pure functions on (leaves, activations)."""
