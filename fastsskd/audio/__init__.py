"""Audio files and formats: what they hold, whether it is whole, and how it is coded."""
