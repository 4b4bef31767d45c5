"""Augmentation: crops and flips (view), the recipes per image and per batch, mixing."""
