"""One tracked training run: data, network, loop and tracking wired together."""
