"""Saves, resumes, exports."""
