"""Images: the image store, and unpacking images into root file systems."""

from limpet.engine.images.directory import DirectoryImageStore, list_images
from limpet.engine.images.store import ImageStore, ImageSummary

__all__ = ["DirectoryImageStore", "ImageStore", "ImageSummary", "list_images"]
