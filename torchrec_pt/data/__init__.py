"""Raw logs -> prepared dataset -> batches."""
