"""Device meshes and the rules by which logical axes are laid over them."""
