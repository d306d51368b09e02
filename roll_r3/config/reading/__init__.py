"""Reading of a file: YAML text, overrides, references, and the comparison with the models."""
