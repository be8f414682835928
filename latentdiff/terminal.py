"""What scripts show in a terminal: our own lines and bars; of the libraries errors and downloads.

A library that imports this package keeps its own settings: only scripts call this.
"""


def quieten_libraries() -> None:
    """Turn off diffusers' and transformers' progress bars and warnings; their errors stay."""
    import diffusers.utils.logging
    import transformers.utils.logging
    from huggingface_hub.utils.tqdm import enable_progress_bars

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    enable_progress_bars()  # of downloads, which take long and were turned off along
