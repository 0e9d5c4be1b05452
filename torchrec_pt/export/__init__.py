"""Embeddings of a trained model in files, with the users' own ids."""

from torchrec_pt.export.embeddings import check_export, export_all, export_embeddings
from torchrec_pt.export.source import Source, load_source

__all__ = ["Source", "check_export", "export_all", "export_embeddings", "load_source"]
