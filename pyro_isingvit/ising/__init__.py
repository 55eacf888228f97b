"""The paper: model, guide, and what moves the masks."""
