"""Images: where they are kept, and how they become root file systems."""

from limpet.engine.images.directory import DirectoryImageStore
from limpet.engine.images.store import ImageStore, ImageSummary

__all__ = ["DirectoryImageStore", "ImageStore", "ImageSummary"]
