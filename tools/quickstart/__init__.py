"""The whole workflow in one command: clips, prepare, train, stop, resume, sample, report.

``python -m quickstart`` runs the command lines of the four packages one after another and checks the files that they
write. Of the packages it imports what ends processes, locks and writes files (``wan_model.system``), and it reads their
files with its own code. ``world_clips`` runs it on the small
world, whose clips a tiny model learns within minutes; ``real_clips`` on three clips that were filmed or animated.
"""
