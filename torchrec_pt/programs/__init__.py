"""The models of a run as programs of torch alone: what `export_model` writes."""
