"""Embeddings of a trained model in files, with the users' own ids."""

from torchrec_pt.export.embeddings import check_export, export_all, export_embeddings

__all__ = ["check_export", "export_all", "export_embeddings"]
