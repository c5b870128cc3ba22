"""Parts of the decoder's blocks: linear maps and norms, and latent attention."""
