"""Images with masks."""

NAMES = ("camvid", "cityscapes", "masks")
