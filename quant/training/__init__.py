"""Training quantized blocks against the model that they were made from."""
