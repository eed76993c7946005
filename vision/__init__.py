"""Frozen vision transformers of timm, adapted to classify other images.

`backbones` names what is adapted, `data` and its neighbours bring the images, `task` trains,
`predict` uses what was trained, `compare` sets several methods side by side, and `cli` puts all of
it behind `polyadapt vision`. Import from the modules: this file loads nothing.
"""
