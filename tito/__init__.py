"""tito: the command line of the course. Each command parses, calls one function, shows, and exits."""
