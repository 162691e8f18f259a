"""Measure and look: pictures, quality tables, speed. Uses the trainer's rooms; nothing there uses this."""
