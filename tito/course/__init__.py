"""What the course is made of: registry, notebooks, export, runs, progress. Prints nothing."""
