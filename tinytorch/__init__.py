"""TinyTorch: a deep-learning framework in NumPy. A file that is built from a lesson says which."""

__version__ = "0.1.0"
