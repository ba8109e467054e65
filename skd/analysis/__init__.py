"""Spectra of a model and the choice of layers: ``skd.analyze``, ``skd.SpectralProfile``, ``skd.pair_layers``.

    measure.py      analyze: one forward per batch, sums that do not depend on how the images are batched
    entropy.py      entropy over the channels, from whole numbers only
    profile.py      SpectralProfile: what was found, its files
    plots.py        the pictures: over depth and over frequency
    pairs.py        pair_layers: which student layer goes with which teacher layer
    choice.py       the choice with its reasons
    layers_file.py  the choice as a YAML file that a person can edit
    gratings.py     images and maps whose spectra are known

Importing this package imports none of them.
"""
