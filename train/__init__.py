"""Training: masked LoRA that recovers what pruning costs, and tiny models from scratch."""
