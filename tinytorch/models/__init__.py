"""Built from the lessons; see the head of each file."""
