"""What `handler.py` and `model_manager.py` are made of. Importing this package does nothing."""

__version__ = "0.1.0"
