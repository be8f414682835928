"""Bill of materials: what a model was made of, as hashes that anyone can compute again."""
