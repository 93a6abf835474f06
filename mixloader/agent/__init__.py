"""The learned policy: features, network, simulator, fitting and the weights that ship."""
