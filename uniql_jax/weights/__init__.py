"""How a weight can be held: dense, packed integers, LoRA, a dense update, fake-quantized; one protocol for all."""
