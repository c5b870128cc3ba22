"""Checks that the documents say what is so: their commands run as printed, what they show is what is printed."""
