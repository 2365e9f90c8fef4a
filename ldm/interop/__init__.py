"""Models of other libraries here, and ours there: diffusers' folders are read and written.

Nothing in this room is imported before it is asked for, and diffusers only by the modules that subclass its networks.
"""
