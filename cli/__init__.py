"""The command line over the same functions that the nodes use; ComfyUI is never imported."""
