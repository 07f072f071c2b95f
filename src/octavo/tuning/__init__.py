"""What octavo tune does: measure the machine with a model, simulate settings under a load, and propose the best."""
