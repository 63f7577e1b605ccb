"""What a run tells: the event log, progress on screen, trackers, and the report made from the log."""
