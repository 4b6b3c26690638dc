"""Commands for maintainers: build and verify."""
