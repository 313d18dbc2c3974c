"""How a weight can be held: packed integers, LoRA, a dense update, fake-quantized."""
