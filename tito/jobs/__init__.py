"""Programs that tito starts in a process of their own; the only files of tito that may run student code."""
