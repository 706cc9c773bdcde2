"""Reading the weights of a FLUX transformer from every layout that checkpoints come in."""
