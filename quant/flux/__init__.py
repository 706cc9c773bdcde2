"""FLUX.1 in plain torch: the blocks that are calibrated and the sizes that describe them."""
