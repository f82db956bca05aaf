"""Data sets: readers by format, splits, batches and augmentation."""
