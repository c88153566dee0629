"""Retrieval: documents that change, searched at answer time."""

from jaxsft.rag.records import Document, Hit, Passage, Section

__all__ = ["Document", "Hit", "Passage", "Section"]
