"""Text-to-image pipelines of diffusers with their models run by ONNX Runtime.

`export_pipeline` writes a folder, `load_pipeline` makes diffusers' own pipeline of one: its
scheduler, its loop and its image processing, around models that are ONNX graphs. `parts.py` says
which models these are and what each takes and gives.
"""
