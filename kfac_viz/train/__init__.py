"""Training with the very objects of `method`: what is averaged, when it is renewed, and how far to go."""
