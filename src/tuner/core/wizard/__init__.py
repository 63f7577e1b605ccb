"""``tuner configure``: from answers in a user's words to a configuration. It asks through an `Asker`, never itself."""
