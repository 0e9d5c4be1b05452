"""One module a family of raw formats: each opens a file as a `Part`."""
