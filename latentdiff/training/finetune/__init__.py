"""Fine-tuning methods: LoRA, textual inversion, and DreamBooth's prior preservation."""
