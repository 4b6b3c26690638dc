"""A small language model that is trained already, for lessons to measure on. Written by hand, not built from a lesson."""
