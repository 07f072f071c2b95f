"""What octavo doctor examines: the host, the installation, the places that a server uses, and a model."""
