"""What is measured of clips to choose among them: scene cuts, motion, sharpness, borders, near-duplicates.

The libraries of the extra ``curation`` (OpenCV, PySceneDetect) are imported on first use, never with a module here.
"""
