"""Products on Hopper alone, in Pallas Mosaic GPU: many rows of x (wgmma), and few rows of narrow outputs (cluster)."""
