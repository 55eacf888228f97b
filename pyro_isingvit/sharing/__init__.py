"""What others get of a network: names without paths, a model card, the Hugging Face Hub."""
