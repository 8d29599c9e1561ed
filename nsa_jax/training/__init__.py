"""Training from the command line: data, optimisation, checkpoints, what a person sees."""
