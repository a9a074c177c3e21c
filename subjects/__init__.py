"""The 30 DreamBooth subjects: names, prompts, photos, illustrated twins."""
