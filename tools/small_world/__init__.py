"""A small world that a model learns on a CPU: captioned clips, an autoencoder for them, and a measure of adherence.

``scenes`` describes the clips and draws them, ``clips`` writes them as H.264 files with captions, ``recognition`` reads
from decoded frames alone what they show, and ``adherence`` compares that with the captions. ``autoencoder`` trains the
autoencoder whose weights are kept beside it, and ``model`` writes a model folder with it. ``commands`` has the command
lines that the quickstart and the longer session ``world`` run on it.
"""
