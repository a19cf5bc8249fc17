"""Running a model, part of it, or a changed copy of it."""
