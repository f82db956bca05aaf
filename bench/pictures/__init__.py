"""The pictures of the documentation, drawn by `python3 -m bench.pictures` into docs/pictures.

`house` draws the architecture, `ideas` how something works, `measured` what the committed results show; `style` is what they share.
"""
