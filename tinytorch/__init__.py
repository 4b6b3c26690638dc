"""TinyTorch: a deep-learning framework in NumPy. Every file below is built from one lesson, and says which."""

__version__ = "0.1.0"
