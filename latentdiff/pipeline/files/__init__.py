"""A pipeline's files: folders, single files, LoRAs, model info and model card."""
