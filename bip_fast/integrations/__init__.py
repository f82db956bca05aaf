"""Trainers of other packages, one small module each. Nothing of bip_fast imports them, and none is imported with bip_fast."""
