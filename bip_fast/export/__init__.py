"""From masks to networks that are smaller and faster, and to the formats of other tools. Imported by none of the rooms of the engine.

Each function stands in the room named after what it does; what needs an optional package says so when it is called.
"""
