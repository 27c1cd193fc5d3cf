"""Longer training on the small world: the curve of adherence over time, and a comparison of settings.

``python -m world`` trains one run and samples each of its checkpoints (``curve``). ``--compare`` trains short runs that
differ in one setting each (``variants``, ``comparison``). Both go on where they were stopped.
"""
