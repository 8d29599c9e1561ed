"""What measures nsa_jax and reproduces the paper; nothing imports this room."""
