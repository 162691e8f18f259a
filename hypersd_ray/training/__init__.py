"""Training steps: state, batch and generator in, metrics out. No Ray."""
