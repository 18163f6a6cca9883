"""The lecture's linear masked autoencoders, in closed form and trained: `python -m studies linear-autoencoder`."""
