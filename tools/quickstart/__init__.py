"""The whole workflow on real clips: prepare, train, stop, resume, sample, report.

``python -m quickstart`` runs the command lines of the four packages one after another and checks the files that they
write. It imports none of the packages and reads their files with its own code.
"""
