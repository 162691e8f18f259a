"""Ray Train around a `Distiller`: workers, checkpoints, progress and logs. No maths."""
