"""Augmentation: where an image is cropped (view), what is done to it (recipe), how images are mixed
(mixing)."""
