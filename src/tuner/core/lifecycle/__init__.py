"""The life of a third-party plugin: written from a scaffold, installed by the right tool, checked, removed.

Nothing here imports a plugin but `check`, so a broken plugin can always be taken out again.
"""
