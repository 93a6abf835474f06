"""The demo: a corpus from what is installed, a base model, and three ways to go on training it."""
