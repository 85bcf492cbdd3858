"""What the docs say about speed, measured."""
