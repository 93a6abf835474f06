"""`python -m mixloader compare`: policies side by side on the same data, tokens and seeds."""
