"""The whole product on real clips, as a user would drive it: prepare, train, stop, resume, sample, report.

``python -m quickstart`` runs the command lines of the four packages one after another and checks what they leave
behind. It imports none of the packages: what it knows of their files it reads for itself.
"""
