"""Longer training on the small world: the curve of adherence over time, settings compared, a LoRA.

``python -m world`` trains one run and samples each of its checkpoints (``curve``). ``--compare`` trains short runs that
differ in one setting each (``variants``, ``comparison``). ``--lora`` trains a LoRA for what the clips of a trained base
never showed (``lora``). All go on where they were stopped.
"""
