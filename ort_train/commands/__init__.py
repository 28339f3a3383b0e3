"""Commands of `ort-train` whose options are told before anything heavy is imported.

Each module has `add_arguments` and `main`, as the modules of other commands have beside their work.
"""
