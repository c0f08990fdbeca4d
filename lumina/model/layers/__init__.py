"""Linear layers and norms, of which the decoder is made."""
