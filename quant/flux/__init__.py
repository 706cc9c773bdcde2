"""FLUX.1 and FLUX.2 in plain torch: the blocks that are calibrated, and their sizes."""
